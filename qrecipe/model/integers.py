"""What torch's quantized tensors do slowly or not at all, by what they do fast.

Each function takes float tensors too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def padded(x: Tensor, widths: Sequence[int]) -> Tensor:
    """``F.pad`` with 0, which on quantized tensors fails for some layouts.

    It is some 3 times faster: filling a quantized tensor costs 15 times as much as copying to it.
    """
    if not x.is_quantized:
        return F.pad(x, widths)
    sides = [(x.dim() - 1 - k // 2, *widths[k : k + 2]) for k in range(0, len(widths), 2)]
    sizes, inner = list(x.shape), x
    for dim, before, after in sides:
        sizes[dim] += before + after
    zero = torch.quantize_per_tensor(torch.zeros(()), x.q_scale(), x.q_zero_point(), x.dtype)
    result = zero.expand(sizes).contiguous(memory_format=_layout(x))
    target = result
    for dim, before, after in sides:
        target = _cropped(target, dim, before, after)
        inner = _cropped(inner, dim, -before, -after)
    target.copy_(inner)
    return result


def rolled(x: Tensor, shifts: Any, dims: Any) -> Tensor:
    """``torch.roll``, for which quantized tensors have no kernel; numbers or tuples of them.

    Joining the parts with ``torch.cat`` goes through floats, and takes 2 to 18 times as long as
    copying each to its new place.
    """
    if not x.is_quantized:
        return x.roll(shifts, dims)
    shifts, dims = (v if isinstance(v, (tuple, list)) else (v,) for v in (shifts, dims))
    total: Counter[int] = Counter()
    for shift, dim in zip(shifts, dims, strict=True):
        total[dim % x.dim()] += shift
    result = torch.empty_like(x)
    parts = [(result, x)]
    for dim, shift in total.items():
        start = shift % max(x.shape[dim], 1)
        parts = [
            (_part(target, dim, *to), _part(source, dim, *of))
            for target, source in parts
            for to, of in (((0, start), (-start, None)), ((start, None), (0, -start or None)))
            if start or to == (0, None)
        ]
    for target, source in parts:
        target.copy_(source)
    return result


def resampled(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``F.interpolate`` that averages, with the scale of its input.

    It is computed in float: torch's kernels for quantized tensors agree to a step, and take up to
    5 times as long as that and both conversions together.
    """
    if not x.is_quantized:
        return F.interpolate(x, *args, **kwargs)
    result = F.interpolate(x.dequantize(), *args, **kwargs)
    return torch.quantize_per_tensor(result, x.q_scale(), x.q_zero_point(), x.dtype)


def laid_out_like(x: Tensor, y: Tensor) -> Tensor:
    """``x`` in the layout in which a kernel reads it together with ``y``.

    A sum or product of two layouts takes up to 30 times as long as of one, and one of a transposed
    layout, as `nn.Conv1d` gives, up to 8 times. That of an image with one number for each channel
    takes up to 6 times as long as with the numbers written out, unless the channels fill vectors of
    128. Other broadcasts are left to the kernel.
    """
    if not torch._C._get_tracing_state():  # there, sizes are tensors, and both are laid out
        if x.shape == y.shape and x.stride() == y.stride() and _is_in_a_common_layout(x):
            return x
        if x.shape != y.shape and not _is_one_for_each_channel(x, y):
            return x
    is_last = _is_only_channels_last(x) or _is_only_channels_last(y)
    x = torch.broadcast_tensors(x, y)[0]  # type: ignore[no-untyped-call]
    if is_last and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if is_last and x.dim() == 5:
        return x.contiguous(memory_format=torch.channels_last_3d)
    return x.contiguous()


def _is_one_for_each_channel(x: Tensor, image: Tensor) -> bool:
    is_pixel = x.dim() == 4 and image.dim() == 4 and x.shape[2] == 1 and x.shape[3] == 1
    return is_pixel and _is_only_channels_last(image) and image.shape[1] % 128 != 0


def _is_in_a_common_layout(x: Tensor) -> bool:
    return x.is_contiguous() or _is_only_channels_last(x)


def _is_only_channels_last(x: Tensor) -> bool:
    is_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        is_last = x.is_contiguous(memory_format=torch.channels_last_3d)
    return is_last and not x.is_contiguous()


def _part(x: Tensor, dim: int, start: int, end: int | None) -> Tensor:
    size = x.shape[dim]
    first, last, _ = slice(start, end).indices(size)
    return x.narrow(dim, first, last - first)


def _cropped(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    start = max(before, 0)
    return x.narrow(dim, start, x.shape[dim] - start - max(after, 0))


def _layout(x: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    is_last = last is not None and x.is_contiguous(memory_format=last)
    return last if last is not None and is_last else torch.contiguous_format
