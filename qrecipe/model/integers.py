"""What torch's quantized tensors do slowly or not at all, by what they do fast.

Each function takes float tensors too. TorchScript compiles all of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def padded(x: Tensor, widths: list[int]) -> Tensor:
    """``F.pad`` with 0, which on quantized tensors fails for some layouts.

    It is some 3 times faster: filling a quantized tensor costs 15 times as much as copying to it.
    """
    if not x.is_quantized:
        return F.pad(x, widths)
    sizes = list(x.shape)
    for k in range(0, len(widths), 2):
        sizes[-1 - k // 2] += widths[k] + widths[k + 1]
    zero = torch.quantize_per_tensor(torch.zeros([]), x.q_scale(), x.q_zero_point(), x.dtype)
    result = _laid_out(zero.expand(sizes), _is_channels_last(x))
    target, inner = result, x
    for k in range(0, len(widths), 2):
        dim = x.dim() - 1 - k // 2
        target = _cropped(target, dim, widths[k], widths[k + 1])
        inner = _cropped(inner, dim, -widths[k], -widths[k + 1])
    target.copy_(inner)
    return result


def rolled(x: Tensor, shifts: list[int], dims: list[int]) -> Tensor:
    """``torch.roll``, for which quantized tensors have no kernel.

    Joining the parts with ``torch.cat`` goes through floats, and takes 2 to 18 times as long as
    copying each to its new place.
    """
    if not x.is_quantized:
        return torch.roll(x, shifts, dims)
    total = [0] * x.dim()
    is_moved = [False] * x.dim()
    for k, dim in enumerate(dims):
        total[dim] += shifts[k]
        is_moved[dim] = True
    result = torch.empty_like(x)
    parts = [(result, x)]
    for dim, shift in enumerate(total):
        start = shift % (1 + _or_zero(x.shape[dim] - 1))  # a dimension may be empty
        rest = x.shape[dim] - start
        if is_moved[dim]:
            halves: list[tuple[Tensor, Tensor]] = []
            for target, source in parts:
                halves.append((target.narrow(dim, 0, start), source.narrow(dim, rest, start)))
                halves.append((target.narrow(dim, start, rest), source.narrow(dim, 0, rest)))
            parts = halves
    for target, source in parts:
        target.copy_(source)
    return result


def resampled(
    x: Tensor,
    size: list[int] | None = None,
    scale_factor: list[float] | None = None,
    mode: str = "bilinear",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """``F.interpolate`` that averages, with the scale of its input.

    It is computed in float: torch's kernels for quantized tensors agree to a step, and take up to
    5 times as long as that and both conversions together.
    """
    values = x.dequantize() if x.is_quantized else x
    result = F.interpolate(
        values, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias
    )
    if not x.is_quantized:
        return result
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
    return _laid_out(x, is_last)


def plainly_laid_out(x: Tensor) -> Tensor:
    """``x``, contiguous if it is contiguous and in channels_last at the same time.

    An image of one pixel or one channel is. `torch.mean` of a quantized one fails if the result has
    no dimensions of size 1 in place of those that are averaged.
    """
    is_traced = torch._C._get_tracing_state()  # there, another image may have one pixel
    if is_traced or (x.is_contiguous() and _is_channels_last(x)):
        return x.flatten().view(x.shape)
    return x


def _laid_out(x: Tensor, is_last: bool) -> Tensor:
    """``x`` contiguous, or in channels_last if it is an image or a volume and ``is_last``."""
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
    return _is_channels_last(x) and not x.is_contiguous()


def _is_channels_last(x: Tensor) -> bool:
    if x.dim() == 5:
        return x.is_contiguous(memory_format=torch.channels_last_3d)
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _cropped(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    start = _or_zero(before)
    return x.narrow(dim, start, x.shape[dim] - start - _or_zero(after))


def _or_zero(n: int) -> int:
    """``max(n, 0)`` without a branch: `torch.jit.trace`, where sizes are tensors, fixes those."""
    return (n + abs(n)) // 2
