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
from qrecipe.model.changes import gives_tuple
from qrecipe.model.graph_sites import Match
from qrecipe.model.moving import moved
from qrecipe.model.nodes import module_of
from qrecipe.model.normalize import MULTIPLIES_WEIGHT, TAKES_WEIGHT
from qrecipe.model.rewrites.batch_norms import why_function
from qrecipe.model.rewrites.constants import is_learnt
from qrecipe.model.rewrites.weighted_layers import computed_argument
from qrecipe.model.trace_proof import Value
from qrecipe.planning.moves import no_move
from qrecipe.planning.plan import EXPORTED
from qrecipe.recipe.schema import Backend, Phase, TensorSpec

_CLAMPS = (nn.ReLU6, nn.Hardtanh, F.relu6, F.hardtanh, F.hardtanh_, torch.clamp)
_MOST_FLOAT16 = torch.finfo(torch.float16).max
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_AVERAGE = (
    *("input", "kernel_size", "stride", "padding", "ceil_mode"),
    *("count_include_pad", "divisor_override"),
)


def refusal(match: Match, backend: Backend) -> str | None:
    """Why a quantized kernel must not or cannot run this operation; None if nothing is known."""
    if match.whole is not None:
        return match.whole
    for module in _modules(match):
        altered = alteration(module)
        if altered is not None:
            return altered
    if match.nodes:  # without a trace, nothing is observed and nothing inserted
        why = _refusal_of_nodes(match, backend)
        if why is not None:
            return why
    subject: Any = match.nodes[0] if match.module is None else match.module
    keys = (subject.target, fx.Node) if match.module is None else type(subject).__mro__
    tables = (_LIMITS, _LIMITS_OF_QNNPACK) if backend == "qnnpack" else (_LIMITS,)
    limits = (table[key] for table in tables for key in keys if key in table)
    reasons = (limit(subject) if callable(limit) else limit for limit in limits)
    known = next(filter(None, reasons), None)
    return known or _infinite(match)


def _refusal_of_nodes(match: Match, backend: Backend) -> str | None:
    """What is only known from a trace."""
    if any(map(is_learnt, match.nodes)):
        return "it only computes with parameters that are trained: no input to observe"
    if match.operation.kind == "passthrough" and not _value(match.nodes[-1]).is_tensor:
        return "it returns several results, which torch would observe as one"
    if backend not in EXPORTED and any(map(gives_tuple, match.nodes)):
        return "its results are read as a whole, and their number may depend on its input"
    if isinstance(match.module, _RECURRENT) and _takes_no_tensor(match.nodes[0]):
        return "it takes a PackedSequence, which FX cannot quantize: pack it inside forward"
    if _lacks_batch(match.nodes[0], match.module):
        return "quantized convolutions need a batch dimension: x.unsqueeze(0)"
    return None


def better_float(match: Match) -> str | None:
    """Why only a rule that names the operation makes it int8; None for most operations."""
    functions = [node.target for node in match.nodes[:1]]
    if isinstance(match.module, nn.SiLU) or F.silu in functions:
        return "faster in float: int8 SiLU is a sigmoid and a product"
    return None


def why_apart(match: Match) -> str | None:
    """Why a BatchNorm is not part of the convolution before it in training."""
    if not isinstance(match.module, nn.modules.batchnorm._BatchNorm) or not match.nodes:
        return None
    before = module_of(match.nodes[0].all_input_nodes[0])
    if not isinstance(before, nn.modules.conv._ConvTransposeNd):
        return None
    return "not folded: torch cannot train a transposed convolution and its BatchNorm as one"


def _takes_no_tensor(node: fx.Node) -> bool:
    source = node.args[0] if node.args else node.kwargs.get("input")
    return isinstance(source, fx.Node) and not _value(source).is_tensor


def _lacks_batch(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the input of a convolution has no batch dimension."""
    source = node.args[0] if node.args else None
    if not isinstance(module, nn.modules.conv._ConvNd) or not isinstance(source, fx.Node):
        return False
    return _value(source).rank == len(module.kernel_size) + 1


NOT_TRAINED = 'training does not simulate float16: set phase = "ptq"'


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
            return NOT_TRAINED
        parameters = [] if match.module is None else match.module.parameters()
        if any(p.numel() and float(p.detach().abs().max()) > _MOST_FLOAT16 for p in parameters):
            return f"it has weights beyond {_MOST_FLOAT16:g}, the limit of float16"
    if backend == "onednn" and weight.dtype == "int8" and not weight.is_symmetric:
        return "onednn takes symmetric weights only"
    columns = getattr(match.module, "embedding_dim", 0)
    if weight.dtype == "uint4" and columns % 2:
        return f"two 4-bit weights share a byte, but rows have {columns} weights"
    return None


def takes_per_channel_weight(match: Match) -> bool:
    """Whether the weight may be quantized per channel: not in transposed convolutions."""
    return not isinstance(match.module, nn.modules.conv._ConvTransposeNd)


def _value(node: fx.Node) -> Value:
    value: Value = node.meta["value"]
    return value


def _modules(match: Match) -> Iterator[nn.Module]:
    """The modules that the operation calls, fused ones as a whole."""
    if not match.nodes and match.module is not None:
        yield match.module  # found without a graph
    yield from filter(None, map(module_of, match.nodes))


def _recurrent(module: Any) -> str | None:
    if not module.bias:
        return "torch cannot convert a recurrent module without bias"
    if getattr(module, "proj_size", 0):
        return "quantized LSTM does not support projections (proj_size)"
    return None


def _embedding_bag(module: Any) -> str | None:
    if module.mode != "sum":
        return f'the quantized kernel sums each bag and ignores mode = "{module.mode}"'
    if module.padding_idx is not None:
        return "the quantized kernel does not skip the row of padding_idx"
    return _EMBEDDING(module)


def _convolution(module: Any) -> str | None:
    reflects = module.padding_mode == "reflect" and not isinstance(module, nn.Conv3d)
    if module.padding_mode != "zeros" and not reflects:
        kind = type(module).__name__
        return f'quantized {kind} does not support padding_mode = "{module.padding_mode}"'
    if isinstance(module.padding, str):
        return f'padding = "{module.padding}" is asymmetric, which no kernel supports'
    return None


def _weighted(node: fx.Node) -> str:
    """Why a layer is still a function: it has no weight that a kernel could pack."""
    computed = computed_argument(node)
    return (
        "its weight is a vector" if computed is None else f"its {computed} is computed, not stored"
    )


def _averaging(subject: Any) -> str | None:
    """What qnnpack divides by: as many numbers as the window has, padding included."""
    given: Mapping[str, Any] = (
        {**dict(zip(_AVERAGE, subject.args, strict=False)), **subject.kwargs}
        if isinstance(subject, fx.Node)
        else vars(subject)
    )
    padding = given.get("padding", 0)
    pads = any(padding) if isinstance(padding, (tuple, list)) else bool(padding)
    divides = given.get("divisor_override") is not None
    if divides or (pads and not given.get("count_include_pad", True)):
        return "qnnpack divides by the size of the window, whatever the arguments are"
    return None


def _observed_argument(node: fx.Node) -> str | None:
    seen = node.all_input_nodes[:1] if node.target is moved else node.all_input_nodes
    for source in seen:
        if source.op == "placeholder" and not _value(source).is_tensor:
            return f'torch would observe its argument "{source.target}", which is not a tensor'
    return None


def _reads_integers(node: fx.Node) -> bool:
    return not all(map(is_floating, node.all_input_nodes))


def _binary(node: fx.Node) -> str | None:
    if node.kwargs:
        return f"the quantized kernel ignores {', '.join(node.kwargs)}"
    if _reads_integers(node):
        return "an operand is not floating-point, but would be observed"
    return None


def _product(node: fx.Node) -> str | None:
    if any(isinstance(arg, (int, float)) and abs(arg) > 1 for arg in node.args):
        return "with a factor above 1, the result would share the range of its input"
    return _binary(node)


def _sum(node: fx.Node) -> str | None:
    if any(isinstance(arg, (int, float)) and arg for arg in node.args):
        return "with an added number, the result would share the range of its input"
    return _binary(node)


def _interpolation(node: fx.Node) -> str | None:
    mode = node.kwargs.get("mode")
    if _value(node).rank == 3:
        return "quantized interpolation needs two or three dimensions besides the channels"
    if node.kwargs.get("antialias"):
        return "quantized interpolation does not support antialias"
    if mode not in ("nearest", "nearest-exact", "bilinear", "area"):
        return f"quantized interpolation does not support mode = {mode!r}"
    return None


def _infinite(match: Match) -> str | None:
    """A mask of -inf, as attention adds one, has no range; only known from a trace.

    What a layer with weights computes is finite, unless the model is at fault.
    """
    if not match.kernels or match.module is not None or match.nodes[0].target in TAKES_WEIGHT:
        return None
    for node in match.nodes:
        for source in (*node.all_input_nodes, node):
            if not _value(source).is_finite:
                is_named = source.op in ("placeholder", "get_attr")
                name = str(source.target).rpartition(".")[2] if is_named else "an operand"
                name = "its result" if source is node else name
                return f"{name} has infinite values, which have no range"
    return None


_Limit = str | Callable[[Any], str | None]
"""Why an operation is refused: always, or depending on the module or node."""


def _if(is_refused: Callable[[Any], bool], why: str) -> Callable[[Any], str | None]:
    return lambda subject: why if is_refused(subject) else None


_SAMPLE_STATISTICS = (
    "the quantized kernel uses the statistics of each sample, not the running statistics"
)
_EMBEDDING = _if(
    lambda module: module.max_norm is not None,
    "the quantized kernel does not renormalise rows to max_norm",
)

_LIMITS: Mapping[Any, _Limit] = {
    F.multi_head_attention_forward: "only nn.MultiheadAttention is opened, not its function",
    F.group_norm: "torch has a pattern for group_norm, but no lowering",
    **dict.fromkeys(("tanh_", "sigmoid_"), "no quantized kernel works in place here"),
    nn.PReLU: "quantized::prelu multiplies positive values by the slope",
    nn.RNN: "torch has quantized kernels for LSTM, GRU and cells, but not for RNN",
    nn.modules.batchnorm._BatchNorm: _if(
        lacks_statistics,
        "the quantized kernel needs running statistics (track_running_stats = True)",
    ),
    nn.modules.instancenorm._InstanceNorm: _if(
        lambda module: module.track_running_stats, _SAMPLE_STATISTICS
    ),
    **dict.fromkeys(_RECURRENT, _recurrent),
    nn.Embedding: _EMBEDDING,
    nn.EmbeddingBag: _embedding_bag,
    nn.modules.conv._ConvNd: _convolution,
    **dict.fromkeys(MULTIPLIES_WEIGHT, _weighted),
    **dict.fromkeys((operator.add, torch.add), _sum),
    **dict.fromkeys((operator.mul, torch.mul), _product),
    torch.matmul: _binary,
    **dict.fromkeys(
        (torch.cat, torch.stack),
        _if(
            _reads_integers,
            "one of the joined tensors is not floating-point, but would be observed",
        ),
    ),
    torch.clamp: _if(
        lambda node: len(node.all_input_nodes) > 1,
        "its limits are tensors, and the quantized kernel takes numbers",
    ),
    torch.mean: _if(
        lambda node: node.kwargs.get("dtype") is not None,
        "the quantized kernel cannot return another dtype",
    ),
    F.batch_norm: why_function,
    F.instance_norm: _if(
        lambda node: not (*node.args[5:6], node.kwargs.get("use_input_stats", True))[0],
        _SAMPLE_STATISTICS,
    ),
    F.interpolate: _interpolation,
    moved: no_move,
    fx.Node: _observed_argument,
}
"""By function, method or class of modules; the last one is for every function."""

_LIMITS_OF_QNNPACK: Mapping[Any, _Limit] = {
    **dict.fromkeys(
        _CLAMPS, "qnnpack's clamp is wrong for channels_last, which its convolutions return"
    ),
    nn.Conv3d: "qnnpack cannot unpack the weights of a Conv3d",
    nn.ConvTranspose3d: "qnnpack cannot unpack the weights of a ConvTranspose3d",
    **dict.fromkeys((nn.MaxPool3d, F.max_pool3d), "qnnpack has no max-pooling in three dimensions"),
    nn.Softmax: _if(
        lambda module: module.dim is None or module.dim < 0,
        "qnnpack does not support a negative dim: count it from the front",
    ),
    **dict.fromkeys((nn.AvgPool2d, nn.AvgPool3d, F.avg_pool2d, F.avg_pool3d), _averaging),
}
