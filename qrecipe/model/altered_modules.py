"""Modules that differ from their class; kernels and fusion only look at classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from qrecipe.model.nodes import called_modules, module_of


def alteration(module: nn.Module) -> str | None:
    """How a module differs from its class: hooks, parametrizations, a replaced forward."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    if hooks:
        cures = [_CURES[kind] for hook in hooks if (kind := _dotted(hook)) in _CURES]
        cure = f"; {cures[0]} makes it a plain module" if cures else ""
        return f"it has hooks, which kernels do not run: {', '.join(map(_name, hooks))}{cure}"
    if parametrize.is_parametrized(module):
        return (
            "its weight is parametrized: torch.nn.utils.parametrize.remove_parametrizations "
            "makes it a plain module"
        )
    if "forward" in vars(module):
        return "its forward was replaced on the instance, but kernels run that of the class"
    return None


_CURES = {
    "torch.nn.utils.weight_norm.WeightNorm": "torch.nn.utils.remove_weight_norm",
    "torch.nn.utils.spectral_norm.SpectralNorm": "torch.nn.utils.remove_spectral_norm",
    "torch.nn.utils.prune": "torch.nn.utils.prune.remove",
}
"""The functions that remove torch's own hooks, by their class or the module of their classes."""


def _dotted(hook: Any) -> str:
    kind = type(hook)
    if kind.__module__ in _CURES:
        return str(kind.__module__)
    return f"{kind.__module__}.{kind.__qualname__}"


def _name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def keep_float(x: Any) -> Any:
    """The identity, inserted between two operations until conversion is done.

    Fusion and matching do not cross it. Nor does lowering, which treats everything between a
    dequantize and a quantize node as a quantized operation.
    """
    return x


def _normalises_another_axis(node: fx.Node) -> bool:
    """Whether a BatchNorm1d normalises another dimension than that of its producer's features.

    With three dimensions it normalises the second one, but the features of a linear layer are in
    the last. The rank is known from a run (``meta["value"]``).
    """
    source = node.args[0] if node.args else None
    producer = module_of(source) if isinstance(source, fx.Node) else None
    if producer is None:
        return False
    rank = source.meta["value"].rank  # type: ignore[union-attr]
    return rank is not None and rank != (2 if isinstance(producer, nn.Linear) else 3)


def keep_apart(graph_module: fx.GraphModule) -> None:
    """Insert `keep_float` around the modules that cannot be fused with their neighbours, in place.

    BatchNorms that may be fused are made affine.
    """
    graph = graph_module.graph
    for node, module in called_modules(graph):
        is_apart = isinstance(module, nn.BatchNorm1d) and _normalises_another_axis(node)
        if not is_apart and alteration(module) is None and not lacks_statistics(module):
            if any(source.op == "call_module" for source in node.all_input_nodes):
                make_affine(module)
            continue
        for source in node.all_input_nodes:
            with graph.inserting_before(node):
                node.replace_input_with(source, _identity(source))
        users = list(node.users)
        with graph.inserting_after(node):
            identity = _identity(node)
        for user in users:
            user.replace_input_with(node, identity)


def _identity(source: fx.Node) -> fx.Node:
    identity = source.graph.call_function(keep_float, (source,))
    identity.meta["value"] = source.meta["value"]
    return identity


def lacks_statistics(module: nn.Module) -> bool:
    """Whether a BatchNorm uses the statistics of each batch, so that nothing can be folded."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None


def make_affine(module: nn.Module) -> None:
    """Give a BatchNorm without weight and bias neutral ones that are not trained.

    torch reads both when it folds a BatchNorm, trains it fused, or quantizes it alone. This also
    applies to a BatchNorm in a sequence, with its ReLU.
    """
    neutral = {"weight": torch.ones_like, "bias": torch.zeros_like}
    norm: Any
    for norm in module.modules():
        is_batch_norm = isinstance(norm, nn.modules.batchnorm._BatchNorm)
        if not is_batch_norm or not isinstance(norm.running_mean, torch.Tensor):
            continue
        norm.affine = True
        for name, like in neutral.items():
            if getattr(norm, name) is None:
                setattr(norm, name, nn.Parameter(like(norm.running_mean), requires_grad=False))
