"""Convolutions that one engine computes wrongly or slowly, but another one correctly.

Large linear layers are in `planning.large_layers`.

torch packs weights for the current engine, and packed weights run under any engine, so a site can
be packed for another engine than its backend's. Whether the engine x86 uses onednn or fbgemm for a
convolution depends on the CPU. Detours do not, so plans are the same on every CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from qrecipe.model.graph_sites import Match
from qrecipe.planning import cpu, fbgemm_groups, onednn_transposed
from qrecipe.planning.convolution import Convolution, convolution_of
from qrecipe.planning.pixels import reads_one_pixel
from qrecipe.planning.plan import Engine
from qrecipe.recipe.schema import Backend, TensorSpec

ENGINES_OF_X86 = ("x86", "fbgemm", "onednn")
"""The engines distinguished here; x86 chooses between the other two."""

_EXACT_LEVELS = 127
"""fbgemm's depthwise kernel is exact for inputs that span at most 7 bits."""

_HANDED_TO_FBGEMM = 100
"""With more groups, the x86 engine uses fbgemm's kernels on every CPU."""

_WIDE_GROUP = 16
"""With more channels per group, fbgemm is about as fast as float without a special kernel."""

_SPREAD = 4
"""fbgemm is slower than float if a strided transposed kernel has more pixels."""

_FEW_CHANNELS = 512
"""And if any other transposed convolution has fewer inputs times outputs."""

_DEPTHWISE_KERNELS = {2: (3, 5, 7), 3: (3, 5)}

_BLOCK = 32
"""The channels that fbgemm's depthwise kernel computes at once."""

_LARGE_SIDE = 5
"""onednn takes longer than float for several outputs per channel if the kernel is smaller."""

_FEW_PER_PIXEL, _FEW_PER_KERNEL = 32, 64
"""With more channels, onednn gains less than it takes longer to start, at batch 1."""

_SATURATES = "fbgemm's depthwise kernel adds in 16 bits and saturates on 8-bit inputs, VNNI or not"

_OVERRUNS = "fbgemm's kernel for small groups is wrong unless the groups fill its vectors"

_OVERRUNS_FLAT = "fbgemm's depthwise 5x5x5 is wrong for images of one pixel in depth or height"

_MISSES_DEPTH = (
    "onednn's depthwise convolution with several outputs per channel is wrong for images of one "
    "pixel in depth"
)

PADS_TOO_WIDELY = "onednn's convolution is wrong if the padding is as wide as the kernel"

_GAPS = "onednn's transposed convolution does not write the outputs that its stride skips"

_TILE_ROW = 64
"""The bytes in a row of a tile of AMX."""

_WRONG_WITH_AMX = "onednn's convolution of few channels is wrong for this shape on CPUs with AMX"


@dataclass(frozen=True, slots=True)
class Detour:
    """The engine for which a site's weights are packed instead of its backend's, and why.

    Without a reason where the backend would use the same one itself on a CPU with VNNI.
    """

    engine: Engine
    why: str | None = None

    @property
    def reason(self) -> str | None:
        """What a plan says about it."""
        return None if self.why is None else f"on {self.engine}'s kernel: {self.why}"


def detour(
    match: Match, backend: Backend, weight: TensorSpec | None, levels: int
) -> Detour | str | None:
    """A detour if the backend's own kernel is wrong, or the reason to stay float if none helps.

    ``levels`` is the number of integers that the input spans, quant_max - quant_min.
    """
    shape = convolution_of(match)
    if shape is None or backend not in ENGINES_OF_X86:
        return None
    if backend == "onednn" and shape.pads_output:
        return "onednn has no transposed convolution with output_padding"
    if backend == "onednn" and shape.leaves_gaps:
        return _GAPS
    takes_onednn = _is_symmetric(weight) and _is_right_on_onednn(shape)
    found = _around_wrong_kernel(shape, backend, takes_onednn)
    if isinstance(found, str):
        return found
    engine = backend if found is None else found.engine
    if engine != "onednn" and levels > _EXACT_LEVELS and _is_fast_depthwise(shape):
        if not takes_onednn:
            return f"{_SATURATES}: set reduce_range = true for its input"
        return Detour("onednn", _SATURATES)
    if found is not None or backend == "onednn":
        return found
    return _around_slow_kernel(match, shape, backend, takes_onednn)


def _is_right_on_onednn(shape: Convolution) -> bool:
    if shape.transposed:
        return not (_swaps_channels_on_onednn(shape) or shape.pads_output or shape.leaves_gaps)
    return _why_not_onednn(shape) is None


def _why_not_onednn(shape: Convolution) -> str | None:
    """Why onednn computes a convolution that is not transposed wrongly, on one kind of CPU."""
    if _is_wrong_with_amx(shape):
        return _WRONG_WITH_AMX
    if pads_too_widely(shape):
        return PADS_TOO_WIDELY
    return _MISSES_DEPTH if _misses_depth(shape) else None


def _why_not_fbgemm(shape: Convolution) -> str | None:
    """Why fbgemm writes beyond the output of a convolution, on one kind of CPU."""
    if fbgemm_groups.overruns(shape):
        return _OVERRUNS
    return _OVERRUNS_FLAT if _overruns_flat_images(shape) else None


def _around_wrong_kernel(
    shape: Convolution, backend: Backend, takes_onednn: bool
) -> Detour | str | None:
    if shape.transposed:
        return _transposed_detour(shape, backend, takes_onednn)
    not_fbgemm, not_onednn = _why_not_fbgemm(shape), _why_not_onednn(shape)
    if not_fbgemm and not_onednn:
        return f"{not_fbgemm}, and {not_onednn}"
    if not_fbgemm and backend != "onednn":
        return Detour("onednn", not_fbgemm) if takes_onednn else not_fbgemm
    if not_onednn and backend != "fbgemm":
        return Detour("fbgemm", not_onednn)
    return None


def _around_slow_kernel(
    match: Match, shape: Convolution, backend: Backend, takes_onednn: bool
) -> Detour | None:
    if shape.transposed:
        return _faster_transposed(shape, backend, takes_onednn)
    if takes_onednn and _is_slow_on_fbgemm(shape) and not _is_left_to_x86(shape, backend):
        return Detour("onednn", "fbgemm has no fast one for this shape")
    if backend == "x86" and shape.outputs == 2 and _is_fast_depthwise(shape):
        return Detour("fbgemm", "onednn's takes longer for two outputs per channel")
    if takes_onednn and _is_slower_on_fbgemm(shape):
        return Detour("onednn", f"fbgemm's is slower below {_BLOCK} channels")
    if backend == "x86" and _is_dense_pixelwise(shape) and reads_one_pixel(match.nodes[0]):
        return Detour("fbgemm", "onednn's takes longer to start on one pixel")
    if backend == "x86" and takes_onednn and _has_few_channels(shape):
        return Detour("onednn")
    return None


def around_wrong_kernel(
    shape: Convolution, engine: Backend, weight: TensorSpec | None
) -> Detour | str | None:
    """A detour around an engine's kernel if that is wrong, or why there is none."""
    if engine not in ENGINES_OF_X86:
        return None
    takes_onednn = _is_symmetric(weight) and _is_right_on_onednn(shape)
    return _around_wrong_kernel(shape, engine, takes_onednn)


def is_wrong(shape: Convolution, backend: Backend) -> bool:
    """Whether the backend's own kernel is wrong, on one kind of CPU at least."""
    return _around_wrong_kernel(shape, backend, takes_onednn=True) is not None


def adds_in_32_bits(match: Match, engine: str) -> bool:
    """Whether the kernel of a convolution never saturates: onednn's depthwise kernel."""
    shape = convolution_of(match) if engine == "onednn" else None
    return shape is not None and shape.is_depthwise and not shape.transposed


def _is_left_to_x86(shape: Convolution, backend: Backend) -> bool:
    """Whether x86 chooses the faster engine itself: fbgemm or onednn, depending on the CPU."""
    return backend == "x86" and shape.groups <= _HANDED_TO_FBGEMM and _is_slow_on_avx2(shape)


def _faster_transposed(shape: Convolution, backend: Backend, takes_onednn: bool) -> Detour | None:
    if not takes_onednn:
        return None
    if not _is_slow_on_avx2(shape):
        return Detour("onednn", "fbgemm's is slower")
    if backend == "x86" and _is_slow_on_avx512(shape):
        return Detour("fbgemm", "onednn has no fast one for this shape")
    return None  # x86 chooses


def _transposed_detour(
    shape: Convolution, backend: Backend, takes_onednn: bool
) -> Detour | str | None:
    if _is_wrong_on_fbgemm(shape):
        reason = (
            "fbgemm's transposed convolution is wrong for kernels of two rows without padding, "
            "if the channels are multiples of 8"
        )
        if _swaps_channels_on_onednn(shape):
            return f"{reason}, and onednn's if input and output channels differ"
        if backend == "onednn":
            return None
        return Detour("onednn", reason) if takes_onednn else reason
    if backend == "fbgemm":
        return None
    if shape.leaves_gaps:
        return Detour("fbgemm", _GAPS)
    if not _swaps_channels_on_onednn(shape):
        return None
    wrong = f"{backend}'s transposed convolution is wrong if input and output channels differ"
    return Detour("fbgemm", wrong)


def is_slow(
    match: Match, backend: Backend, weight: TensorSpec | None, engine: Engine | None
) -> bool:
    """Whether a convolution, transposed or in groups, is slower than in float, on this CPU."""
    shape = convolution_of(match)
    if shape is None or backend not in ENGINES_OF_X86:
        return False
    if _runs_on_fbgemm(shape, backend, weight, engine):
        return _is_slow_on_fbgemm(shape)
    has_avx512 = cpu.class_of_cpu().startswith("avx512")
    return _is_slow_on_avx512(shape) if has_avx512 else _is_slow_on_avx2(shape)


def _runs_on_fbgemm(
    shape: Convolution, backend: Backend, weight: TensorSpec | None, engine: Engine | None
) -> bool:
    if engine is not None or backend != "x86":
        return (engine or backend) == "fbgemm"
    return (
        cpu.class_of_cpu() != "avx512_vnni"
        or shape.groups > _HANDED_TO_FBGEMM
        or shape.pads_output
        or not _is_symmetric(weight)
    )


def _is_slow_on_fbgemm(shape: Convolution) -> bool:
    if shape.inputs == 1:
        return shape.is_depthwise and not _is_fast_depthwise(shape)
    if shape.groups == 1 or shape.inputs > _WIDE_GROUP:
        return shape.transposed and _spreads_slowly(shape)
    if shape.transposed:
        return True
    return not fbgemm_groups.has_kernel(shape)


def _spreads_slowly(shape: Convolution) -> bool:
    """Whether fbgemm is slower at adding up the products of a transposed convolution than float is.

    Measured for one to three dimensions, kernels of 2 to 4 and 8 to 128 channels, on both kinds of
    CPUs.
    """
    if shape.steps and len(shape.kernel) > 1:
        return prod(shape.kernel) > _SPREAD
    return shape.inputs * shape.outputs < _FEW_CHANNELS


def _is_slower_on_fbgemm(shape: Convolution) -> bool:
    """Whether onednn's depthwise kernel is the faster one, with VNNI and without."""
    is_plain = len(shape.kernel) == 2 and shape.outputs == 1
    return is_plain and _is_fast_depthwise(shape) and shape.groups < _BLOCK


def _is_dense_pixelwise(shape: Convolution) -> bool:
    is_plain = not shape.transposed and shape.groups == 1 and len(shape.kernel) == 2
    return is_plain and set(shape.kernel) == {1} and not any(shape.padding)


def _has_few_channels(shape: Convolution) -> bool:
    """Whether onednn's dense kernel is faster, without VNNI too.

    Measured for one to three dimensions and batch 1 and 8: docs/decisions/0013-engines.md.
    """
    if shape.groups > 1 and (shape.inputs <= _WIDE_GROUP or _is_slow_on_avx2(shape)):
        return False
    if set(shape.kernel) == {1}:
        return min(shape.inputs, shape.outputs) <= _FEW_PER_PIXEL
    return shape.inputs <= _FEW_PER_KERNEL


def _is_slow_on_avx2(shape: Convolution) -> bool:
    """Whether onednn only has its reference kernel without AVX512."""
    if shape.transposed:
        return onednn_transposed.is_slow_on_avx2(shape)
    if shape.groups == 1:
        return False
    if shape.inputs == shape.outputs == 1:
        return len(shape.kernel) > 2
    return bool(shape.inputs % 4 or shape.outputs % 4)


def _is_slow_on_avx512(shape: Convolution) -> bool:
    """Whether onednn has no fast kernel, even with AVX512."""
    if shape.transposed:
        return onednn_transposed.is_slow_on_avx512(shape)
    if not shape.is_depthwise:
        return False
    if shape.outputs > 1:
        large: int = _LARGE_SIDE ** min(2, len(shape.kernel))
        return prod(shape.kernel) < large
    return len(shape.kernel) > 2 and max(shape.dilations) > 1


def _swaps_channels_on_onednn(shape: Convolution) -> bool:
    """Whether onednn takes the outputs of a transposed convolution's weights for its inputs."""
    return shape.transposed and not shape.has_one_order


def _is_wrong_on_fbgemm(shape: Convolution) -> bool:
    """Whether fbgemm uses its direct kernel, which reads the weights in the wrong order."""
    return (
        shape.transposed
        and shape.groups == 1
        and len(shape.kernel) == 2
        and shape.kernel[0] == 2
        and shape.inputs % 8 == 0
        and shape.outputs % 8 == 0
        and set(shape.stride) <= {1, 2}
        and set(shape.padding) == {0}
        and set(shape.dilation) == {1}
    )


def _is_wrong_with_amx(shape: Convolution) -> bool:
    """Whether onednn is wrong for some images, in groups or with rows that fill two tiles or more.

    Measured on random shapes in one to three dimensions.
    """
    if shape.transposed:
        return False
    if shape.groups > 1 and shape.inputs < 32:
        return shape.outputs > (16 if any(shape.padding) else 32)
    row = shape.kernel[-1] * shape.inputs
    return shape.inputs < _TILE_ROW and row >= 2 * _TILE_ROW and row % _TILE_ROW == 0


def _misses_depth(shape: Convolution) -> bool:
    """Whether onednn reads beyond an image of one pixel in depth, with AVX512."""
    several = shape.is_depthwise and shape.outputs > 1 and not shape.transposed
    return several and len(shape.kernel) == 3 and shape.paddings[0] > 0


def pads_too_widely(shape: Convolution) -> bool:
    """Whether onednn reads beyond its input, or crashes, because a window has no pixel of it.

    With AVX512 for several outputs per channel, and on every CPU for one dilated pixel.
    """
    sides = zip(shape.spans, shape.paddings, strict=True)
    is_known = (shape.is_depthwise and shape.outputs > 1) or max(shape.dilations) > 1
    return is_known and any(span <= pad for span, pad in sides)


def _overruns_flat_images(shape: Convolution) -> bool:
    """Whether fbgemm computes all rows and slices whose kernel reaches beyond the image.

    If it has one row or slice and the kernel five, they are more than there are.
    """
    return len(shape.kernel) == 3 and shape.kernel[0] > 3 and _is_fast_depthwise(shape)


def _is_fast_depthwise(shape: Convolution) -> bool:
    """Whether fbgemm has a special depthwise kernel for the shape."""
    size = shape.kernel[0]
    return (
        not shape.transposed
        and shape.inputs == 1
        and shape.outputs <= 2
        and shape.groups % 8 == 0
        and size in _DEPTHWISE_KERNELS.get(len(shape.kernel), ())
        and set(shape.kernel) == {size}
        and set(shape.padding) == {size // 2}
        and set(shape.stride) <= {1, 2}
        and set(shape.dilation) == {1}
    )


def _is_symmetric(weight: TensorSpec | None) -> bool:
    return weight is not None and weight.is_symmetric
