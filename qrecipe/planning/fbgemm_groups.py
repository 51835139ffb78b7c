"""fbgemm's kernel for convolutions of few channels per group, and where it is wrong.

It computes as many groups at once as fill a vector, and writes beyond its output if the groups are
no multiple of that: wrong results, or the end of the process. The condition is that of
fbgemmOptimizedGConv in FBGEMM's GroupwiseConv.cc.
"""

from __future__ import annotations

from qrecipe.planning.convolution import Convolution

_CHANNELS = (2, 4, 8, 16)
"""The input and output channels per group that it has code for."""

_VECTORS = (8, 16)
"""The numbers in a vector, with AVX2 and with AVX512."""


def has_kernel(shape: Convolution) -> bool:
    """Whether fbgemm has a fast and correct kernel for groups, on every CPU."""
    return _is_for_groups(shape) and all(
        shape.groups % together == 0 for together in _groups_at_once(shape)
    )


def overruns(shape: Convolution) -> bool:
    """Whether fbgemm writes beyond its output, on one kind of CPU at least."""
    return _is_for_groups(shape) and any(
        shape.groups > together and shape.groups % together for together in _groups_at_once(shape)
    )


def _groups_at_once(shape: Convolution) -> list[int]:
    return [max(1, numbers // shape.outputs) for numbers in _VECTORS]


def _is_for_groups(shape: Convolution) -> bool:
    return (
        not shape.transposed
        and shape.groups > 1
        and shape.is_even
        and shape.inputs in _CHANNELS
        and len(shape.kernel) > 1
        and set(shape.kernel) == {3}
        and set(shape.paddings) == {1}
        and set(shape.strides[-2:]) in ({1}, {2})
        and set(shape.dilations) == {1}
    )
