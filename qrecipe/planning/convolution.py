"""The shape of a convolution, as a module or as a function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from qrecipe.model.graph_sites import Match
from qrecipe.model.nodes import stored
from qrecipe.model.normalize import DIMENSIONS, MULTIPLIES_WEIGHT


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
        return Convolution(
            transposed=isinstance(module, nn.modules.conv._ConvTransposeNd),
            kernel=tuple(module.kernel_size),
            stride=module.stride,
            padding=module.padding if module.padding_mode == "zeros" else (0,),
            output_padding=module.output_padding,
            dilation=module.dilation,
            groups=module.groups,
            inputs=module.in_channels // module.groups,
            outputs=module.out_channels // module.groups,
        )
    node = match.nodes[0] if match.nodes else None
    if module is not None or node is None or node.target not in DIMENSIONS:
        return None
    given: dict[str, Any] = dict(zip(MULTIPLIES_WEIGHT[node.target], node.args, strict=False))
    graph_module = node.graph.owning_module
    weight = None if graph_module is None else stored(given["weight"], graph_module)
    if weight is None:
        return None
    transposed, groups = "output_padding" in given, given["groups"]
    channels = (weight.shape[0] // groups, weight.shape[1])
    inputs, outputs = channels if transposed else reversed(channels)
    return Convolution(
        transposed=transposed,
        kernel=tuple(weight.shape[2:]),
        stride=given["stride"],
        padding=given["padding"],
        output_padding=given.get("output_padding", ()),
        dilation=given["dilation"],
        groups=groups,
        inputs=inputs,
        outputs=outputs,
    )
