"""Known limits of single kernels beyond torch's BackendConfig: wrong or missing ones.

A test reproduces each refusal with the installed torch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qrecipe.model.addresses import is_floating
from qrecipe.model.altered_modules import alteration, lacks_statistics
from qrecipe.model.graph_sites import Match
from qrecipe.model.normalize import stored
from qrecipe.model.trace_proof import Value
from qrecipe.recipe.schema import Backend, Phase, TensorSpec

_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CLAMPS = (nn.ReLU6, nn.Hardtanh, F.relu6, F.hardtanh, F.hardtanh_, torch.clamp)
_NOT_IN_QNNPACK = (nn.Conv3d, nn.ConvTranspose3d)
_F_CONV_TRANSPOSE = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_DIMENSIONS: Mapping[Any, int] = {
    **dict.fromkeys((nn.Conv1d, nn.ConvTranspose1d, F.conv1d, F.conv_transpose1d), 1),
    **dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d, F.conv2d, F.conv_transpose2d), 2),
    **dict.fromkeys((nn.Conv3d, nn.ConvTranspose3d, F.conv3d, F.conv_transpose3d), 3),
}
_WEIGHTED = (F.linear, F.conv1d, F.conv2d, F.conv3d, *_F_CONV_TRANSPOSE)
_MOST_FLOAT16 = torch.finfo(torch.float16).max
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_BINARY = (operator.add, operator.mul, torch.add, torch.mul, torch.matmul)
_OPERANDS: Mapping[Any, str] = {
    **dict.fromkeys(_BINARY, "an operand"),
    **dict.fromkeys((torch.cat, torch.stack), "one of the joined tensors"),
}


_AVERAGE = (
    *("input", "kernel_size", "stride", "padding", "ceil_mode"),
    *("count_include_pad", "divisor_override"),
)
_SAMPLE_STATISTICS = (
    "the quantized kernel uses the statistics of each sample, not the running statistics"
)


def refusal(match: Match, backend: Backend) -> str | None:
    """Why a quantized kernel must not or cannot run this operation; None if nothing is known."""
    for module in _modules(match):
        altered = alteration(module)
        if altered is not None:
            return altered
    if match.operation.kind == "passthrough" and _gives_several(match):
        return "it returns several results, which torch would observe as one"
    if isinstance(match.module, _RECURRENT) and _takes_no_tensor(match):
        return "it takes a PackedSequence, which FX cannot quantize: pack it inside forward"
    if _lacks_batch(match):
        return "quantized convolutions need a batch dimension: x.unsqueeze(0)"
    subject: Any = match.nodes[0] if match.module is None else match.module
    target = subject.target if match.module is None else type(subject)
    checks = _FUNCTION_CHECKS if match.module is None else _MODULE_CHECKS
    refused = _REFUSED.get(target)
    if backend == "qnnpack":
        checks, refused = checks + _QNNPACK_CHECKS, refused or _REFUSED_IN_QNNPACK.get(target)
    return refused or next(filter(None, (check(subject) for check in checks)), None)


def _gives_several(match: Match) -> bool:
    """Only known from a trace: without one, there are no nodes and nothing is observed."""
    return bool(match.nodes) and not _value(match.nodes[-1]).is_tensor


def _takes_no_tensor(match: Match) -> bool:
    """Only known from a trace: module by module, nothing is inserted before a module."""
    if not match.nodes:
        return False
    node = match.nodes[0]
    source = node.args[0] if node.args else node.kwargs.get("input")
    return isinstance(source, fx.Node) and not _value(source).is_tensor


def _lacks_batch(match: Match) -> bool:
    """Whether the input of a convolution has no batch dimension."""
    if not match.nodes or not match.nodes[0].args:
        return False
    node, module = match.nodes[0], match.module
    source = node.args[0]
    dimensions = _DIMENSIONS.get(node.target if module is None else type(module))
    if dimensions is None or not isinstance(source, fx.Node):
        return False
    return _value(source).rank == dimensions + 1


def weight_refusal(
    match: Match, backend: Backend, phase: Phase, weight: TensorSpec | None
) -> str | None:
    """Why the kernel must not or cannot run with such a weight; None if nothing is known."""
    if weight is None:
        return None
    if weight.dtype == "float16":
        if backend == "qnnpack":
            return "qnnpack has no float16 kernels"
        if phase == "qat":
            return 'training does not simulate float16: set phase = "ptq"'
        if _beyond_float16(match.module):
            return f"it has weights beyond {_MOST_FLOAT16:g}, the limit of float16"
    columns = getattr(match.module, "embedding_dim", 0)
    if weight.dtype == "uint4" and columns % 2:
        return f"two 4-bit weights share a byte, but rows have {columns} weights"
    return None


def _beyond_float16(module: nn.Module | None) -> bool:
    parameters = [] if module is None else module.parameters()
    return any(p.numel() and float(p.detach().abs().max()) > _MOST_FLOAT16 for p in parameters)


def takes_per_channel_weight(match: Match) -> bool:
    """Whether the weight may be quantized per channel: not in transposed convolutions."""
    if match.module is not None:
        return not isinstance(match.module, _CONV_TRANSPOSE)
    return match.nodes[0].target not in _F_CONV_TRANSPOSE


def _value(node: fx.Node) -> Value:
    value: Value = node.meta["value"]
    return value


def _modules(match: Match) -> Iterator[nn.Module]:
    """The modules that the operation calls, fused ones as a whole."""
    if not match.nodes and match.module is not None:
        yield match.module  # found without a graph
    for node in match.nodes:
        graph_module = node.graph.owning_module
        if node.op == "call_module" and graph_module is not None:
            yield graph_module.get_submodule(str(node.target))


def _norm_statistics(module: nn.Module) -> str | None:
    if lacks_statistics(module):
        return "the quantized kernel needs running statistics (track_running_stats = True)"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
        return _SAMPLE_STATISTICS
    return None


def _prelu(module: nn.Module) -> str | None:
    if isinstance(module, nn.PReLU):
        return "quantized::prelu multiplies positive values by the slope"
    return None


def _recurrent(module: nn.Module) -> str | None:
    if not isinstance(module, _RECURRENT):
        return None
    if type(module) is nn.RNN:
        return "torch has quantized kernels for LSTM, GRU and cells, but not for RNN"
    if not module.bias:
        return "torch cannot convert a recurrent module without bias"
    if getattr(module, "proj_size", 0):
        return "quantized LSTM does not support projections (proj_size)"
    return None


def _embedding(module: nn.Module) -> str | None:
    if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return None
    if module.max_norm is not None:
        return "the quantized kernel does not renormalise rows to max_norm"
    if isinstance(module, nn.EmbeddingBag):
        if module.mode != "sum":
            return f'the quantized kernel sums each bag and ignores mode = "{module.mode}"'
        if module.padding_idx is not None:
            return "the quantized kernel does not skip the row of padding_idx"
    return None


def _qnnpack_dimensions(module: nn.Module) -> str | None:
    if isinstance(module, _NOT_IN_QNNPACK):
        return f"qnnpack cannot unpack the weights of a {type(module).__name__}"
    return None


def _padding(module: nn.Module) -> str | None:
    if not isinstance(module, nn.modules.conv._ConvNd):
        return None
    if isinstance(module.padding, str):
        return f'padding = "{module.padding}" is asymmetric, which no kernel supports'
    can_reflect = not isinstance(module, nn.Conv3d)
    if module.padding_mode != "zeros" and not (can_reflect and module.padding_mode == "reflect"):
        kind = type(module).__name__
        return f'quantized {kind} does not support padding_mode = "{module.padding_mode}"'
    return None


def _binary_arguments(node: fx.Node) -> str | None:
    if node.target in _BINARY and node.kwargs:
        return f"the quantized kernel ignores {', '.join(node.kwargs)}"
    return None


def _computed_weight(node: fx.Node) -> str | None:
    if node.target not in _WEIGHTED:
        return None
    for name, source in zip(("weight", "bias"), node.args[1:3], strict=False):
        if isinstance(source, fx.Node) and source.op != "get_attr":
            return f"its {name} is computed, not stored"
    return None


def _padding_word(node: fx.Node) -> str | None:
    if node.target in _WEIGHTED and len(node.args) > 4 and isinstance(node.args[4], str):
        return f'padding = "{node.args[4]}" is asymmetric, which no kernel supports'
    return None


def _mean_dtype(node: fx.Node) -> str | None:
    if node.target is torch.mean and node.kwargs.get("dtype") is not None:
        return "the quantized kernel cannot return another dtype"
    return None


def _averaging(subject: Any) -> str | None:
    """What qnnpack divides by: as many numbers as the window has, padding included."""
    settings: tuple[Any, Any, Any]
    if isinstance(subject, (nn.AvgPool2d, nn.AvgPool3d)):
        settings = (subject.padding, subject.count_include_pad, subject.divisor_override)
    elif isinstance(subject, fx.Node) and subject.target in (F.avg_pool2d, F.avg_pool3d):
        given = {**dict(zip(_AVERAGE, subject.args, strict=False)), **subject.kwargs}
        settings = (
            given.get("padding", 0),
            given.get("count_include_pad", True),
            given.get("divisor_override"),
        )
    else:
        return None
    padding, counts_padding, divisor = settings
    pads = any(padding) if isinstance(padding, (tuple, list)) else bool(padding)
    if divisor is not None or (pads and not counts_padding):
        return "qnnpack divides by the size of the window, whatever the arguments are"
    return None


def _qnnpack_softmax(module: nn.Module) -> str | None:
    if isinstance(module, nn.Softmax) and (module.dim is None or module.dim < 0):
        return "qnnpack does not support a negative dim: count it from the front"
    return None


def _given_statistics(node: fx.Node) -> str | None:
    if node.target is not F.instance_norm:
        return None
    uses_input = node.args[5] if len(node.args) > 5 else node.kwargs.get("use_input_stats", True)
    return None if uses_input else _SAMPLE_STATISTICS


def _observed_argument(node: fx.Node) -> str | None:
    for source in node.all_input_nodes:
        if source.op == "placeholder" and not _value(source).is_tensor:
            return f'torch would observe its argument "{source.target}", which is not a tensor'
    return None


def _operands(node: fx.Node) -> str | None:
    what = _OPERANDS.get(node.target)
    if what is None or all(map(is_floating, node.all_input_nodes)):
        return None
    return f"{what} is not floating-point, but would be observed"


def _infinite_operand(node: fx.Node) -> str | None:
    """A mask of -inf, as attention adds one, has no range."""
    graph_module = node.graph.owning_module
    if node.target not in _BINARY or graph_module is None:
        return None
    for source in node.all_input_nodes:
        mask = stored(source, graph_module)
        if mask is not None and mask.is_floating_point() and not bool(mask.isfinite().all()):
            name = str(source.target).rpartition(".")[2]
            return f"{name} has infinite values or NaN, which have no range"
    return None


def _number(node: fx.Node) -> str | None:
    numbers = [arg for arg in node.args if isinstance(arg, (int, float))]
    if node.target in (operator.mul, torch.mul) and any(abs(number) > 1 for number in numbers):
        return "with a factor above 1, the result would share the range of its input"
    if node.target in (operator.add, torch.add) and any(numbers):
        return "with an added number, the result would share the range of its input"
    return None


def _interpolation(node: fx.Node) -> str | None:
    if node.target is F.interpolate and node.kwargs.get("antialias"):
        return "quantized interpolation does not support antialias"
    if node.target is F.interpolate and node.kwargs.get("mode") not in (
        "nearest",
        "nearest-exact",
        "bilinear",
        "area",
    ):
        return f"quantized interpolation does not support mode = {node.kwargs.get('mode')!r}"
    return None


_REFUSED: Mapping[Any, str] = {
    F.group_norm: "torch has a pattern for group_norm, but no lowering",
    **dict.fromkeys(("tanh_", "sigmoid_"), "no quantized kernel works in place here"),
}
_REFUSED_IN_QNNPACK: Mapping[Any, str] = {
    F.conv_transpose3d: "qnnpack computes transposed convolutions wrongly in three dimensions",
    **dict.fromkeys(
        _CLAMPS, "qnnpack's clamp is wrong for channels_last, which its convolutions return"
    ),
}
"""Functions, methods and classes of modules that are refused whatever their arguments are."""

_Checks = tuple[Callable[[Any], str | None], ...]
_MODULE_CHECKS: _Checks = (_norm_statistics, _prelu, _recurrent, _embedding, _padding)
_FUNCTION_CHECKS: _Checks = (
    _binary_arguments,
    _operands,
    _infinite_operand,
    _computed_weight,
    _padding_word,
    _mean_dtype,
    _given_statistics,
    _observed_argument,
    _number,
    _interpolation,
)
_QNNPACK_CHECKS: _Checks = (_qnnpack_dimensions, _qnnpack_softmax, _averaging)
