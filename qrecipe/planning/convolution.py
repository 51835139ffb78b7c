"""The shape of a convolution, as a module or as a function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from qrecipe.model.graph_sites import Match
from qrecipe.model.nodes import stored
from qrecipe.model.normalize import DIMENSIONS, MULTIPLIES_WEIGHT

_SETTINGS = ("stride", "padding", "output_padding", "dilation", "groups")


@dataclass(frozen=True, slots=True)
class Convolution:
    """The shape of a convolution; ``inputs`` and ``outputs`` are channels per group."""

    transposed: bool
    kernel: tuple[int, ...]
    stride: Any
    padding: Any
    output_padding: Any
    dilation: Any
    groups: int
    inputs: int
    outputs: int

    @property
    def is_depthwise(self) -> bool:
        return self.inputs == 1 and self.groups > 1

    @property
    def is_even(self) -> bool:
        """Whether it has as many output as input channels."""
        return self.inputs == self.outputs

    @property
    def has_one_order(self) -> bool:
        """Whether inputs and outputs of a group can be swapped without moving any weights."""
        return self.is_even or 1 in (self.inputs, self.outputs)

    @property
    def leaves_gaps(self) -> bool:
        """Whether a transposed convolution has adjacent outputs that no input reaches.

        They should be the bias, but onednn writes nothing there.
        """
        return self.transposed and any(
            stride > size + 1
            for stride, size in zip(self._each(self.stride), self._sizes(), strict=True)
        )

    @property
    def steps(self) -> bool:
        """Whether any stride is above 1."""
        return any(stride > 1 for stride in self._each(self.stride))

    @property
    def fills_steps(self) -> bool:
        """Whether the sides of a transposed convolution's outputs are multiples of its strides."""
        sides = zip(
            self._each(self.stride),
            self._sizes(),
            self._each(self.padding),
            self._each(self.output_padding or (0,)),
            strict=True,
        )
        return all((size - 2 * pad + more) % stride == 0 for stride, size, pad, more in sides)

    @property
    def pads_output(self) -> bool:
        return any(self.output_padding)

    def _sizes(self) -> list[int]:
        """How many pixels the kernel spans."""
        dilations = self._each(self.dilation)
        return [d * (size - 1) + 1 for size, d in zip(self.kernel, dilations, strict=True)]

    def _each(self, values: Any) -> list[int]:
        """One value for each dimension."""
        return list(values) if len(values) == len(self.kernel) else [values[0]] * len(self.kernel)


def convolution_of(match: Match) -> Convolution | None:
    """None for other operations, and for functions whose weight is computed."""
    module = match.module
    if isinstance(module, nn.modules.conv._ConvNd):
        transposed, kernel = (
            isinstance(module, nn.modules.conv._ConvTransposeNd),
            module.kernel_size,
        )
        given: dict[str, Any] = {name: getattr(module, name) for name in _SETTINGS}
        if module.padding_mode != "zeros":
            given["padding"] = (0,)
        inputs, outputs = module.in_channels, module.out_channels
    else:
        node = match.nodes[0] if match.nodes and module is None else None
        if node is None or node.target not in DIMENSIONS or node.graph.owning_module is None:
            return None
        given = dict(zip(MULTIPLIES_WEIGHT[node.target], node.args, strict=False))
        weight = stored(given["weight"], node.graph.owning_module)
        if weight is None:
            return None
        transposed, kernel = "output_padding" in given, weight.shape[2:]
        inputs, outputs = weight.shape[1] * given["groups"], weight.shape[0]
        if transposed:
            inputs, outputs = outputs, inputs
    groups, output_padding = given["groups"], given.get("output_padding", ())
    settings = (given["stride"], given["padding"], output_padding, given["dilation"], groups)
    return Convolution(transposed, tuple(kernel), *settings, inputs // groups, outputs // groups)
