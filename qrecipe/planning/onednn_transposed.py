"""The transposed convolutions that onednn has no fast kernel for.

The conditions are oneDNN's own (jit_uni_x8s8s32x_deconvolution.cpp for AVX2,
jit_avx512_core_x8s8s32x_deconvolution.cpp and jit_brgemm_deconv.cpp for AVX512). What has no kernel
is computed by one for matrices, which takes up to 5,500 times as long as in float.
"""

from __future__ import annotations

from dataclasses import dataclass

from qrecipe.planning.convolution import Convolution


@dataclass(frozen=True, slots=True)
class _Vectors:
    """How many channels a vector holds, and how many registers a kernel uses for them."""

    channels: int
    registers: int


_AVX2, _AVX512 = _Vectors(8, 12), _Vectors(16, 30)

_MOST_BLOCKS = 4
"""The vectors of channels that a kernel computes at once."""

_SMALLEST_BLOCK = 4
"""The channels of a group are a multiple of this."""


def is_slow_on_avx2(shape: Convolution) -> bool:
    """Whether onednn has no fast kernel without AVX512."""
    return not _has_kernel(shape, _AVX2)


def is_slow_on_avx512(shape: Convolution) -> bool:
    """Whether onednn has no fast kernel even with AVX512."""
    is_depthwise = shape.is_depthwise and shape.is_even
    is_filled = shape.fills_steps and max(shape.dilations) == 1
    if is_depthwise and len(shape.kernel) == 2 and shape.steps and is_filled:
        return True  # another kernel is taken, which is slow
    if _has_kernel(shape, _AVX512):
        return False
    if shape.groups > 1 and shape.is_even and len(shape.kernel) > 2:
        return True
    if shape.steps:
        return not is_filled
    return is_depthwise or _pads_whole_kernel(shape)


def _has_kernel(shape: Convolution, vectors: _Vectors) -> bool:
    blocks = _blocks(shape, vectors)
    if blocks is None or _pads_whole_kernel(shape):
        return False
    dilated = zip(shape.dilations, shape.strides, strict=True)
    if any(dilation > 1 and stride > 1 for dilation, stride in dilated):
        return False
    return _covers_edges(shape, blocks, vectors.registers)


def _blocks(shape: Convolution, vectors: _Vectors) -> int | None:
    """How many vectors the output channels of a group fill, if there is a layout for them."""
    if shape.groups == 1:
        return -(-shape.outputs // vectors.channels)
    if shape.inputs == shape.outputs == 1:
        return 1 if len(shape.kernel) < 3 else None
    block = vectors.channels
    while shape.inputs % block or shape.outputs % block:
        block //= 2
        if block < _SMALLEST_BLOCK:
            return None
    return shape.outputs // block


def _pads_whole_kernel(shape: Convolution) -> bool:
    return any(span <= pad for span, pad in zip(shape.spans, shape.paddings, strict=True))


def _covers_edges(shape: Convolution, blocks: int, registers: int) -> bool:
    """Whether the pixels of a row that are computed at once include all at an edge.

    Their number is a multiple of the stride. Rows of any length are assumed.
    """
    stride, span, pad = shape.strides[-1], shape.spans[-1], shape.paddings[-1]
    at_once = next(
        number
        for number in range(min(_MOST_BLOCKS, blocks), 0, -1)
        if number == 1 or (blocks % number == 0 and pad <= registers // (number + 1))
    )
    pixels = registers // (at_once + 1) // stride * stride
    return 0 < pixels >= max(0, span - 1 - pad) // stride * stride
