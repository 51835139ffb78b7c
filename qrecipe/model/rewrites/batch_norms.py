"""BatchNorm in any spelling becomes a module of torch's own, which torch fuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qrecipe.model.altered_modules import alteration
from qrecipe.model.graph_names import outer
from qrecipe.model.normalize import free_name, stored
from qrecipe.model.switches import BATCH_NORMS, arguments
from qrecipe.model.trace import InTraining
from qrecipe.rules.structure import joined

_BatchNorm = nn.modules.batchnorm._BatchNorm

_BY_RANK: Mapping[int | None, type[_BatchNorm]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
"""torch's classes by the rank of what they normalise."""

_TENSORS = ("running_mean", "running_var", "weight", "bias")
_ARGUMENTS = ("input", *_TENSORS, "training", "momentum", "eps")

_REASON = "why_function"


FROZEN = "frozen"
"""Marks, in a node's ``meta``, what stays in eval mode in training: statistics of a BatchNorm."""


def batch_norms_as_modules(
    graph_module: fx.GraphModule, path: str, training: InTraining | None
) -> None:
    """Turn calls that normalise by stored statistics into modules that share the tensors, in place.

    ``path`` is that of the graph in the whole model. If it is trained, ``training`` tells which
    BatchNorms update their statistics.
    """
    calls = [node for node in graph_module.graph.nodes if node.target in BATCH_NORMS]
    for node in calls:
        given = arguments(node)
        node.target, node.kwargs = F.batch_norm, {}
        node.args = tuple(map(given.get, _ARGUMENTS))
    readers = Counter(map(_statistics, calls))
    for node in calls:
        given = _given(node)
        reason = _why_not(given)
        momentum = None if training is None else training.momenta.get(node.name)
        if momentum is not None and reason is None and readers[_statistics(node)] > 1:
            reason = "another call has the same statistics, and training cannot share them"
        if reason is not None:
            node.meta[_REASON] = reason
            continue
        if momentum is None:
            node.meta[FROZEN] = True
        _replace(node, graph_module, given["momentum"] if momentum is None else momentum)
    for node in graph_module.graph.nodes:
        if node.op != "call_module" or node in calls:
            continue
        if training is None:
            _unsynchronise(node, graph_module)
        elif joined(path, outer(node.target)) not in training.trained:
            node.meta[FROZEN] = True


def why_function(node: fx.Node) -> str:
    """Why a call of ``F.batch_norm`` was not turned into a module."""
    return str(node.meta[_REASON])


def frozen_in_training(graph_module: fx.GraphModule, switched: Mapping[str, Any]) -> Iterator[str]:
    """The paths of modules that update statistics in training mode, which the graph does not."""
    for node in graph_module.graph.nodes:
        if node.target is F.batch_norm and node.name in switched:
            yield node.meta["member"].scopes[0]


def _given(node: fx.Node) -> dict[str, Any]:
    return dict(zip(_ARGUMENTS, node.args, strict=True))


def _statistics(node: fx.Node) -> Any:
    return getattr(_given(node)["running_mean"], "target", None)


def _why_not(given: Mapping[str, Any]) -> str | None:
    if given["training"] is not False or given["running_mean"] is None:
        return "it normalises by the statistics of each batch, so nothing can be folded"
    for name in _TENSORS:
        value = given[name]
        if value is not None and not (isinstance(value, fx.Node) and value.op == "get_attr"):
            return f"its {name} is computed, not stored"
    rank = given["input"].meta["value"].rank
    return None if rank in _BY_RANK else f"it normalises a tensor of {rank} dimensions"


def _replace(node: fx.Node, graph_module: fx.GraphModule, momentum: float) -> None:
    given = _given(node)
    tensors = {name: stored(given[name], graph_module) for name in _TENSORS}
    module = _sharing(_BY_RANK[given["input"].meta["value"].rank], tensors, given["eps"])
    if momentum == given["momentum"]:
        module.momentum = momentum
    else:  # a cumulative average, which passes the share of the next batch in training mode
        module.momentum = None
        module.num_batches_tracked = torch.tensor(round(1 / momentum) - 1)
    owner, _, _ = str(given["running_mean"].target).rpartition(".")
    path = free_name(graph_module, joined(owner, "batch_norm"))
    graph_module.add_submodule(path, module)
    node.op, node.target, node.args = "call_module", path, (given["input"],)
    for name in _TENSORS:
        if given[name] is not None and not given[name].users:
            graph_module.graph.erase_node(given[name])


def _sharing(kind: type[_BatchNorm], tensors: Mapping[str, Tensor], eps: float) -> _BatchNorm:
    """A BatchNorm in eval mode with these tensors, which may be buffers."""
    module = kind(len(tensors["running_mean"]), eps)
    for name in ("running_mean", "running_var"):
        module.register_buffer(name, tensors[name])
    module.affine = tensors["weight"] is not None
    for name in ("weight", "bias"):
        tensor = tensors[name]
        if tensor is not None and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        module.register_parameter(name, tensor)
    return module.eval()


def _unsynchronise(node: fx.Node, graph_module: fx.GraphModule) -> None:
    """Replace a SyncBatchNorm, which is a plain BatchNorm in eval mode."""
    module: Any = graph_module.get_submodule(str(node.target))
    kind = _BY_RANK.get(node.meta["value"].rank)
    is_plain = type(module) is nn.SyncBatchNorm and alteration(module) is None
    if is_plain and kind is not None and module.running_mean is not None:
        tensors = {name: getattr(module, name) for name in _TENSORS}
        graph_module.set_submodule(str(node.target), _sharing(kind, tensors, module.eps))
