"""Linear layers and convolutions as functions become modules where something folds into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from qrecipe.model.normalize import free_name, stored
from qrecipe.model.rewrites.channel_arithmetic import is_channel_arithmetic
from qrecipe.model.rewrites.shape_readers import readers_of_values

_WEIGHTED = ("input", "weight", "bias")
_SETTINGS = (*_WEIGHTED, "stride", "padding", "dilation", "groups")
_TRANSPOSED_SETTINGS = (*_WEIGHTED, "stride", "padding", "output_padding", "groups", "dilation")
_MODULES: Mapping[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.linear: (nn.Linear, _WEIGHTED),
    F.conv1d: (nn.Conv1d, _SETTINGS),
    F.conv2d: (nn.Conv2d, _SETTINGS),
    F.conv3d: (nn.Conv3d, _SETTINGS),
    F.conv_transpose1d: (nn.ConvTranspose1d, _TRANSPOSED_SETTINGS),
    F.conv_transpose2d: (nn.ConvTranspose2d, _TRANSPOSED_SETTINGS),
    F.conv_transpose3d: (nn.ConvTranspose3d, _TRANSPOSED_SETTINGS),
}
"""The modules, and the arguments as they were spelled out by `normalize.normalize`."""


def folded_layers_as_modules(graph_module: fx.GraphModule) -> None:
    """Turn calls with stored weights into modules that share the tensors, in place.

    Only if a BatchNorm, or arithmetic with stored tensors, is all that reads the result: torch
    folds those into modules alone. Calls must be normalised.
    """
    for node in list(graph_module.graph.nodes):
        if node.target not in _MODULES or node.kwargs or not _is_folded(node, graph_module):
            continue
        kind, names = _MODULES[node.target]
        given = dict(zip(names, node.args, strict=False))
        tensors = {name: stored(given.get(name), graph_module) for name in ("weight", "bias")}
        if any(tensors[name] is None and given.get(name) is not None for name in tensors):
            continue  # computed
        settings = {name: given[name] for name in names[len(_WEIGHTED) :]}
        path = free_name(graph_module, node.name)
        graph_module.add_submodule(path, _made(kind, settings, **tensors))
        sources = node.all_input_nodes
        node.op, node.target, node.args = "call_module", path, (given["input"],)
        for source in sources:
            if source.op == "get_attr" and not source.users:
                graph_module.graph.erase_node(source)


def _is_folded(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    readers = readers_of_values(node)
    if len(readers) != 1:
        return False
    (reader,) = readers
    if reader.op == "call_module":
        module = graph_module.get_submodule(str(reader.target))
        return isinstance(module, nn.modules.batchnorm._BatchNorm)
    return is_channel_arithmetic(reader, node, graph_module)


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
