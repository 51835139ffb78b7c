"""Convolutions that one engine computes wrongly or slowly, but another one correctly.

torch packs weights for the current engine, and packed weights run under any engine, so a site can
be packed for another engine than its backend's. Whether the engine x86 uses onednn or fbgemm for a
convolution depends on the CPU. Detours do not, so plans are the same on every CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn

from qrecipe.model.graph_sites import Match
from qrecipe.model.normalize import stored
from qrecipe.planning import cpu
from qrecipe.planning.pixels import reads_one_pixel
from qrecipe.planning.plan import Engine
from qrecipe.recipe.schema import Backend, TensorSpec

_ENGINES = ("x86", "fbgemm", "onednn")
"""The engines distinguished here; x86 chooses between the other two."""

_EXACT_LEVELS = 127
"""fbgemm's depthwise kernel is exact for inputs that span at most 7 bits."""

_HANDED_TO_FBGEMM = 100
"""With more groups, the x86 engine uses fbgemm's kernels on every CPU."""

_WIDE_GROUP = 16
"""With more channels per group, fbgemm is as fast as float without a special kernel."""

_GROUPS_OF = (2, 4, 8, 16)
"""The input and output channels per group for which fbgemm has a special kernel."""

_DEPTHWISE_KERNELS = {2: (3, 5, 7), 3: (3, 5)}

_BLOCK = 32
"""The channels that fbgemm's depthwise kernel computes at once."""

_GAPS = "onednn's transposed convolution does not write the outputs that its stride skips"

_WRONG_WITH_AMX = (
    "onednn's padded convolution in groups of fewer than 32 input and more than 16 output channels "
    "is wrong on CPUs with AMX"
)

_FUNCTIONS: dict[Any, bool] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), False),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), True),
}
"""Whether a function is the transposed convolution."""


@dataclass(frozen=True, slots=True)
class Detour:
    """The engine for which a site's weights are packed instead of its backend's, and why."""

    engine: Engine
    reason: str


@dataclass(frozen=True, slots=True)
class _Shape:
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
    def leaves_gaps(self) -> bool:
        """Whether a transposed convolution has adjacent outputs that no input reaches.

        They should be the bias, but onednn writes nothing there.
        """
        count = len(self.kernel)
        strides, dilations = (
            value if len(value) == count else [value[0]] * count
            for value in (self.stride, self.dilation)
        )
        return self.transposed and any(
            stride > dilation * (size - 1) + 2
            for size, stride, dilation in zip(self.kernel, strides, dilations, strict=True)
        )

    @property
    def pads_output(self) -> bool:
        return any(self.output_padding)


def detour(
    match: Match, backend: Backend, weight: TensorSpec | None, levels: int
) -> Detour | str | None:
    """A detour if the backend's own kernel is wrong, or the reason to stay float if none helps.

    ``levels`` is the number of integers that the input spans, quant_max - quant_min.
    """
    shape = _shape(match)
    if shape is None or backend not in _ENGINES:
        return None
    if backend == "onednn" and shape.pads_output:
        return "onednn has no transposed convolution with output_padding"
    if backend == "onednn" and shape.leaves_gaps:
        return _GAPS
    takes_onednn = (
        _is_symmetric(weight)
        and not shape.pads_output
        and not shape.leaves_gaps
        and not _is_wrong_with_amx(shape)
    )
    found = _around_wrong_kernel(shape, backend, takes_onednn)
    if found is not None or backend == "onednn":
        return found
    if levels > _EXACT_LEVELS and _is_fast_depthwise(shape):
        reason = (
            "fbgemm's depthwise kernel adds in 16 bits and saturates on 8-bit inputs, VNNI or not"
        )
        if not takes_onednn:
            return f"{reason}: set reduce_range = true for its input"
        return Detour("onednn", f"on onednn's kernel: {reason}")
    if takes_onednn and _is_slow_on_fbgemm(shape) and not _is_left_to_x86(shape, backend):
        return Detour("onednn", "on onednn's kernel: fbgemm has no fast one for this shape")
    if takes_onednn and _is_slower_on_fbgemm(shape):
        return Detour(
            "onednn",
            f"on onednn's kernel: fbgemm's is slower unless channels are a multiple of {_BLOCK}",
        )
    if backend == "x86" and _is_dense_pixelwise(shape) and reads_one_pixel(match.nodes[0]):
        return Detour("fbgemm", "on fbgemm's kernel: onednn's takes longer to start on one pixel")
    return None


def _around_wrong_kernel(
    shape: _Shape, backend: Backend, takes_onednn: bool
) -> Detour | str | None:
    if shape.transposed:
        return _transposed_detour(shape, backend, takes_onednn)
    if backend != "fbgemm" and _is_wrong_with_amx(shape):
        return Detour("fbgemm", f"on fbgemm's kernel: {_WRONG_WITH_AMX}")
    return None


def adds_in_32_bits(match: Match, engine: str) -> bool:
    """Whether the kernel of a convolution never saturates: onednn's depthwise kernel."""
    shape = _shape(match) if engine == "onednn" else None
    return shape is not None and shape.is_depthwise and not shape.transposed


def _is_left_to_x86(shape: _Shape, backend: Backend) -> bool:
    """Whether x86 chooses the faster engine itself: fbgemm or onednn, depending on the CPU."""
    return backend == "x86" and shape.groups <= _HANDED_TO_FBGEMM and _is_slow_on_avx2(shape)


def _transposed_detour(shape: _Shape, backend: Backend, takes_onednn: bool) -> Detour | str | None:
    wrong_on_onednn = (
        f"{backend}'s transposed convolution is wrong if input and output channels differ"
    )
    if _is_wrong_on_fbgemm(shape):
        reason = (
            "fbgemm's transposed convolution is wrong for kernels of two rows without padding, "
            "if the channels are multiples of 8"
        )
        if not shape.is_even:
            return f"{reason}, and onednn's if input and output channels differ"
        if backend == "onednn":
            return None
        return Detour("onednn", f"on onednn's kernel: {reason}") if takes_onednn else reason
    if backend == "fbgemm":
        return None
    if shape.leaves_gaps:
        return Detour("fbgemm", f"on fbgemm's kernel: {_GAPS}")
    if shape.is_even:
        return None
    return Detour("fbgemm", f"on fbgemm's kernel: {wrong_on_onednn}")


def is_slow(
    match: Match, backend: Backend, weight: TensorSpec | None, engine: Engine | None
) -> bool:
    """Whether a convolution is 2 to 200 times slower than in float, on this CPU."""
    shape = _shape(match)
    if shape is None or backend not in _ENGINES:
        return False
    if shape.transposed:
        return shape.is_depthwise
    if _runs_on_fbgemm(shape, backend, weight, engine):
        return _is_slow_on_fbgemm(shape)
    return not cpu.class_of_cpu().startswith("avx512") and _is_slow_on_avx2(shape)


def _runs_on_fbgemm(
    shape: _Shape, backend: Backend, weight: TensorSpec | None, engine: Engine | None
) -> bool:
    if engine is not None or backend != "x86":
        return (engine or backend) == "fbgemm"
    return (
        cpu.class_of_cpu() != "avx512_vnni"
        or shape.groups > _HANDED_TO_FBGEMM
        or shape.pads_output
        or not _is_symmetric(weight)
    )


def _is_slow_on_fbgemm(shape: _Shape) -> bool:
    if shape.transposed or shape.inputs == 1:
        return shape.is_depthwise and not _is_fast_depthwise(shape)
    if shape.groups == 1 or shape.inputs > _WIDE_GROUP:
        return False
    has_kernel = (
        shape.is_even
        and shape.inputs in _GROUPS_OF
        and len(shape.kernel) > 1
        and set(shape.kernel) == {3}
        and set(shape.padding) == {1}
        and set(shape.stride) <= {1, 2}
        and set(shape.dilation) == {1}
    )
    return not has_kernel


def _is_slower_on_fbgemm(shape: _Shape) -> bool:
    """Whether onednn's depthwise kernel is the faster one, with VNNI and without."""
    is_plain = len(shape.kernel) == 2 and shape.outputs == 1
    return is_plain and _is_fast_depthwise(shape) and shape.groups % _BLOCK != 0


def _is_dense_pixelwise(shape: _Shape) -> bool:
    is_plain = not shape.transposed and shape.groups == 1 and len(shape.kernel) == 2
    return is_plain and set(shape.kernel) == {1} and not any(shape.padding)


def _is_slow_on_avx2(shape: _Shape) -> bool:
    """Whether onednn only has its reference kernel without AVX512."""
    if shape.groups == 1 or shape.transposed:
        return False
    if shape.inputs == shape.outputs == 1:
        return len(shape.kernel) > 2
    return bool(shape.inputs % 4 or shape.outputs % 4)


def _is_wrong_on_fbgemm(shape: _Shape) -> bool:
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


def _is_wrong_with_amx(shape: _Shape) -> bool:
    """Whether onednn corrects the padding of a grouped convolution for the wrong zero point."""
    return (
        not shape.transposed
        and shape.groups > 1
        and len(shape.kernel) == 2
        and shape.inputs < 32
        and shape.outputs > 16
        and any(shape.padding)
    )


def _is_fast_depthwise(shape: _Shape) -> bool:
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


def _shape(match: Match) -> _Shape | None:
    """The shape; None for other operations and for functions whose weight is computed."""
    module = match.module
    if isinstance(module, nn.modules.conv._ConvNd):
        return _Shape(
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
    if module is not None or node is None or node.target not in _FUNCTIONS:
        return None
    weight = _stored_weight(match)
    if weight is None:
        return None
    arguments: list[Any] = list(node.args[3:])
    first, second, kernel = weight.shape[0], weight.shape[1], tuple(weight.shape[2:])
    if _FUNCTIONS[node.target]:
        stride, padding, output_padding, groups, dilation = arguments
        channels = (first // groups, second)
    else:
        stride, padding, dilation, groups = arguments
        output_padding = ()
        channels = (second, first // groups)
    return _Shape(
        _FUNCTIONS[node.target],
        *(kernel, stride, padding, output_padding, dilation, groups),
        *channels,
    )


def _stored_weight(match: Match) -> Any:
    node = match.nodes[0]
    graph_module = node.graph.owning_module
    return None if graph_module is None else stored(node.args[1], graph_module)


def _is_symmetric(weight: TensorSpec | None) -> bool:
    return weight is not None and (weight.qscheme or "").endswith("symmetric")
