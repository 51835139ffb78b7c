"""The shape of a convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from qrecipe.model.graph_sites import Match


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
    return shape_of(module) if isinstance(module, nn.modules.conv._ConvNd) else None


def shape_of(module: Any) -> Convolution:
    """That of a convolution of torch's, float or quantized."""
    return Convolution(
        module.transposed,
        module.kernel_size,
        module.stride,
        module.padding if module.padding_mode == "zeros" else (0,),
        module.output_padding,
        module.dilation,
        module.groups,
        module.in_channels // module.groups,
        module.out_channels // module.groups,
    )
