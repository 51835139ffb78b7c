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
            stride > span + 1 for stride, span in zip(self.strides, self.spans, strict=True)
        )

    @property
    def steps(self) -> bool:
        """Whether any stride is above 1."""
        return any(stride > 1 for stride in self.strides)

    @property
    def fills_steps(self) -> bool:
        """Whether the sides of a transposed convolution's outputs are multiples of its strides."""
        more = self._each(self.output_padding or (0,))
        sides = zip(self.strides, self.spans, self.paddings, more, strict=True)
        return all((span - 2 * pad + more) % stride == 0 for stride, span, pad, more in sides)

    @property
    def pads_output(self) -> bool:
        return any(self.output_padding)

    @property
    def strides(self) -> list[int]:
        """In each dimension, as the other lists."""
        return self._each(self.stride)

    @property
    def paddings(self) -> list[int]:
        return self._each(self.padding)

    @property
    def dilations(self) -> list[int]:
        return self._each(self.dilation)

    @property
    def spans(self) -> list[int]:
        """How many pixels the kernel spans."""
        return [d * (size - 1) + 1 for size, d in zip(self.kernel, self.dilations, strict=True)]

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
        _padding_of(module),
        module.output_padding,
        module.dilation,
        module.groups,
        module.in_channels // module.groups,
        module.out_channels // module.groups,
    )


def _padding_of(module: Any) -> tuple[int, ...]:
    if module.padding_mode != "zeros" or module.padding == "valid":
        return (0,)
    if module.padding == "same":
        sides = zip(module.kernel_size, module.dilation, strict=True)
        return tuple(d * (size - 1) // 2 for size, d in sides)
    padding: tuple[int, ...] = module.padding
    return padding
