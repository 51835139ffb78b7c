"""Convolutions that one engine computes wrongly and another right.

torch packs weights for the engine of the moment, and what is packed runs under any engine. So a
site can be packed for another engine than its backend's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import nn

from qrecipe.inventory import Match
from qrecipe.schema import Backend, TensorSpec

Engine = Literal["fbgemm", "onednn"]

_EXACT_LEVELS = 127
"""fbgemm's depthwise kernel is exact for inputs that span no more integers than 7 bits do."""

_HANDED_TO_FBGEMM = 100
"""With more groups than this the x86 engine uses fbgemm's kernels."""

_WIDE_GROUP = 16
_GROUPS_OF = (2, 4, 8)
"""Channels of a group for which fbgemm has a kernel of its own, as many in as out."""

_DEPTHWISE_KERNELS = {2: (3, 5, 7), 3: (3, 5)}

_FUNCTIONS: dict[Any, tuple[bool, int]] = {
    F.conv1d: (False, 1),
    F.conv2d: (False, 2),
    F.conv3d: (False, 3),
    F.conv_transpose1d: (True, 1),
    F.conv_transpose2d: (True, 2),
    F.conv_transpose3d: (True, 3),
}


@dataclass(frozen=True, slots=True)
class Detour:
    """The engine that a site's weights are packed for instead of its backend's, and why."""

    engine: Engine
    reason: str


def detour(
    match: Match, backend: Backend, weight: TensorSpec | None, levels: int
) -> Detour | str | None:
    """A detour where the backend's own kernel is wrong, the reason to stay float where none helps.

    ``levels`` is how many integers the input spans, its quant_max - quant_min.
    """
    if backend == "onednn" and _pads_the_output(match):
        return "onednn has no transposed convolution with output_padding"
    if _is_uneven_transpose(match) and backend in ("x86", "onednn"):
        reason = f"{backend}'s transposed convolution is wrong where in and out channels differ"
        if match.module is None:
            return reason
        return Detour("fbgemm", f"on fbgemm's kernel: {reason}")
    if (
        levels > _EXACT_LEVELS
        and _is_fast_depthwise(match)
        and _uses_fbgemm(match, backend, weight)
    ):
        reason = (
            "fbgemm's depthwise kernel adds in 16 bits and saturates on 8-bit inputs, VNNI or not"
        )
        if match.module is None or not _is_symmetric(weight):
            return f"{reason}: give what it reads reduce_range = true"
        return Detour("onednn", f"on onednn's kernel: {reason}")
    can_move = match.module is not None and _is_symmetric(weight)
    if can_move and is_slow_on_fbgemm(match, backend, weight):
        return Detour("onednn", "on onednn's kernel: fbgemm has no fast one for this shape")
    return None


def is_slow_on_fbgemm(match: Match, backend: Backend, weight: TensorSpec | None) -> bool:
    """Whether fbgemm would compute a grouped convolution 2 to 200 times slower than float."""
    if not _uses_fbgemm(match, backend, weight):
        return False
    if _is_depthwise_transpose(match):
        return True
    shape = _shape(match)
    if shape is None:
        return False
    *_, groups, inputs, outputs = shape
    if groups == 1 or inputs >= _WIDE_GROUP:
        return False
    if inputs == 1:
        return not _is_fast_depthwise(match)
    return inputs != outputs or inputs not in _GROUPS_OF


def is_slow_anyway(match: Match, backend: Backend) -> bool:
    """Whether every kernel is 2 times slower than float at least: depthwise and transposed."""
    return backend in ("x86", "fbgemm", "onednn") and _is_depthwise_transpose(match)


def _is_depthwise_transpose(match: Match) -> bool:
    module = match.module
    return (
        isinstance(module, nn.modules.conv._ConvTransposeNd)
        and module.in_channels == module.groups > 1
    )


def _pads_the_output(match: Match) -> bool:
    module = match.module
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return any(module.output_padding)
    node = match.nodes[0]
    transposed, _ = _FUNCTIONS.get(node.target, (False, 0))
    padding = node.args[5] if transposed and len(node.args) > 5 else 0
    return any(padding) if isinstance(padding, (tuple, list)) else bool(padding)


def _is_uneven_transpose(match: Match) -> bool:
    module = match.module
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return module.in_channels != module.out_channels
    node = match.nodes[0]
    transposed, _ = _FUNCTIONS.get(node.target, (False, 0))
    weight = _stored_weight(match) if transposed else None
    if weight is None:
        return False
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    return bool(weight.shape[0] != weight.shape[1] * groups)


def _stored_weight(match: Match) -> Any:
    node = match.nodes[0]
    source, graph_module = node.args[1], node.graph.owning_module
    if graph_module is None or getattr(source, "op", None) != "get_attr":
        return None
    path, _, name = str(source.target).rpartition(".")  # type: ignore[union-attr]
    return getattr(graph_module.get_submodule(path), name)


def _is_fast_depthwise(match: Match) -> bool:
    """Whether fbgemm has its own depthwise kernel for the shape."""
    shape = _shape(match)
    if shape is None:
        return False
    kernel, stride, padding, dilation, groups, inputs, outputs = shape
    size = kernel[0]
    return (
        inputs == 1
        and outputs <= 2
        and groups % 8 == 0
        and size in _DEPTHWISE_KERNELS.get(len(kernel), ())
        and kernel == (size,) * len(kernel)
        and padding == tuple(k // 2 for k in kernel)
        and set(stride) <= {1, 2}
        and set(dilation) == {1}
    )


def _shape(match: Match) -> tuple[Any, Any, Any, Any, int, int, int] | None:
    """Kernel, stride, padding, dilation, groups, and input and output channels of a group."""
    module = match.module
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        groups = module.groups
        return (
            *(tuple(module.kernel_size), tuple(module.stride), module.padding),
            *(tuple(module.dilation), groups),
            *(module.in_channels // groups, module.out_channels // groups),
        )
    if module is not None:
        return None
    node = match.nodes[0]
    if node.target not in (F.conv1d, F.conv2d, F.conv3d):
        return None
    weight = _stored_weight(match)
    if weight is None:
        return None
    stride, padding, dilation, groups = (cast(Any, argument) for argument in node.args[3:7])
    outputs = weight.shape[0] // groups
    return tuple(weight.shape[2:]), stride, padding, dilation, groups, weight.shape[1], outputs


def _uses_fbgemm(match: Match, backend: Backend, weight: TensorSpec | None) -> bool:
    if backend != "x86":
        return backend == "fbgemm"
    return _groups(match) > _HANDED_TO_FBGEMM or not _is_symmetric(weight)


def _groups(match: Match) -> int:
    if isinstance(match.module, nn.modules.conv._ConvNd):
        return match.module.groups
    shape = _shape(match)
    return 1 if shape is None else shape[4]


def _is_symmetric(weight: TensorSpec | None) -> bool:
    return weight is not None and (weight.qscheme or "").endswith("symmetric")
