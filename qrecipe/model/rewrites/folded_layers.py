"""Linear layers and convolutions as functions become modules where something folds into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from qrecipe.model.nodes import erase_unread, free_name, module_of, stored
from qrecipe.model.normalize import MULTIPLIES_WEIGHT
from qrecipe.model.rewrites.channel_arithmetic import is_channel_arithmetic
from qrecipe.model.rewrites.shape_readers import readers_of_values

_MODULES: Mapping[Any, type[nn.Module]] = {
    F.linear: nn.Linear,
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv3d: nn.Conv3d,
    F.conv_transpose1d: nn.ConvTranspose1d,
    F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d,
}
_TENSORS = ("weight", "bias")


def folded_layers_as_modules(graph_module: fx.GraphModule) -> None:
    """Turn calls with stored weights into modules that share the tensors, in place.

    Only if a BatchNorm, or arithmetic with stored tensors, is all that reads the result: torch
    folds those into modules alone. Calls must be normalised.
    """
    for node in list(graph_module.graph.nodes):
        if node.target not in _MODULES or node.kwargs or not _is_folded(node, graph_module):
            continue
        given = dict(zip(MULTIPLIES_WEIGHT[node.target], node.args, strict=False))
        x, tensors = given.pop("input"), {name: given.pop(name, None) for name in _TENSORS}
        found = {name: stored(tensor, graph_module) for name, tensor in tensors.items()}
        if any(found[name] is None and tensors[name] is not None for name in _TENSORS):
            continue  # computed
        path = free_name(graph_module, node.name)
        graph_module.add_submodule(path, _made(_MODULES[node.target], given, **found))
        sources = node.all_input_nodes
        node.op, node.target, node.args = "call_module", path, (x,)
        erase_unread(sources)


def _is_folded(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    readers = readers_of_values(node)
    return len(readers) == 1 and (
        isinstance(module_of(readers[0]), nn.modules.batchnorm._BatchNorm)
        or is_channel_arithmetic(readers[0], node, graph_module)
    )


def _made(kind: Any, settings: Mapping[str, Any], weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The module of a class with these tensors, weight (outputs, inputs, ...) or transposed."""
    first, second = weight.shape[:2]
    groups = settings.get("groups", 1)
    if issubclass(kind, nn.modules.conv._ConvTransposeNd):
        sizes = {"in_channels": first, "out_channels": second * groups}
    elif issubclass(kind, nn.Linear):
        sizes = {"in_features": second, "out_features": first}
    else:
        sizes = {"in_channels": second * groups, "out_channels": first}
    if settings:
        sizes["kernel_size"] = tuple(weight.shape[2:])
    module: nn.Module = kind(**sizes, **settings, bias=bias is not None, device="meta").eval()
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        module.register_parameter(name, tensor)
    return module
