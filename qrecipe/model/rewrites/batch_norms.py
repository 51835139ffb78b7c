"""BatchNorm in any spelling becomes a module of torch's own, which torch fuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qrecipe.model.altered_modules import alteration
from qrecipe.model.graph_names import outer
from qrecipe.model.nodes import call_instead, called_modules, graph_module_of, module_of, stored
from qrecipe.model.sharing import with_tensors
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

SYNCHRONISED = "synchronised"
"""Marks a BatchNorm that takes the statistics of all processes of a group, which is the value."""

IN_TRAINING = (FROZEN, SYNCHRONISED)


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
        _replace(node, given["momentum"] if momentum is None else momentum)
    for node, module in called_modules(graph_module.graph):
        if node in calls:
            continue
        is_plain = type(module) is nn.SyncBatchNorm and alteration(module) is None
        group = unsynchronise(node) if is_plain else None
        name = joined(path, outer(str(node.target)))
        if training is not None and name not in training.trained:
            node.meta[FROZEN] = True
        elif training is not None and group is not None:
            node.meta[SYNCHRONISED] = group


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


def _replace(node: fx.Node, momentum: float) -> None:
    given = _given(node)
    tensors = {name: stored(given[name]) for name in _TENSORS}
    kind = _BY_RANK[given["input"].meta["value"].rank]
    is_affine = tensors["weight"] is not None
    module = kind(len(tensors["running_mean"]), given["eps"], affine=is_affine).eval()
    if momentum == given["momentum"]:
        module.momentum = momentum
    else:  # a cumulative average, which passes the share of the next batch in training mode
        module.momentum = None
        module.num_batches_tracked = torch.tensor(round(1 / momentum) - 1)
    owner, _, _ = str(given["running_mean"].target).rpartition(".")
    call_instead(node, with_tensors(module, tensors), given["input"], joined(owner, "batch_norm"))


def unsynchronise(node: fx.Node) -> tuple[Any, ...] | None:
    """Replace a SyncBatchNorm with a plain BatchNorm, which it is in eval mode, in place.

    It may be part of the module that is called. The result has its process group, which may be
    None; the result is None if there is no SyncBatchNorm with statistics.
    """
    group: tuple[Any, ...] | None = None
    kind = _BY_RANK.get(node.meta["value"].rank)
    for name, module in list(module_of(node).named_modules()):
        if not isinstance(module, nn.SyncBatchNorm) or kind is None or module.running_mean is None:
            continue
        plain = kind(module.num_features, module.eps, module.momentum, module.affine, device="meta")
        plain._parameters, plain._buffers = dict(module._parameters), dict(module._buffers)
        path = joined(str(node.target), name)
        graph_module_of(node).set_submodule(path, plain.train(module.training))
        group = (module.process_group,)
    return group


def synchronise(node: fx.Node, prepared: fx.GraphModule) -> None:
    """Make the BatchNorm in a module of a prepared graph a SyncBatchNorm again, in place."""
    (group,) = node.meta[SYNCHRONISED]
    module = prepared.get_submodule(str(node.target))
    again = nn.SyncBatchNorm.convert_sync_batchnorm(module, group)  # type: ignore[no-untyped-call]
    prepared.set_submodule(str(node.target), again)
