"""Linear layers and convolutions that are called as functions become modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from qrecipe.model.nodes import call_instead, stored
from qrecipe.model.normalize import MULTIPLIES_WEIGHT, padding_in_numbers
from qrecipe.model.sharing import with_tensors

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


def weighted_layers_as_modules(graph_module: fx.GraphModule) -> None:
    """Turn calls with stored weights into modules that share the tensors, in place.

    Fusion, kernels and the audit then only have to know modules.
    """
    for node in graph_module.graph.nodes:
        if node.target not in _MODULES or computed_argument(node) is not None:
            continue
        given = _given(node)
        x, tensors = given.pop("input"), {name: given.pop(name, None) for name in _TENSORS}
        found = {name: stored(tensor) for name, tensor in tensors.items()}
        if found["weight"].dim() > 1:
            call_instead(node, _layer(_MODULES[node.target], given, found), x)


def computed_argument(node: fx.Node) -> str | None:
    """The argument of such a call, besides its input, that is computed and not stored, or None."""
    for name, value in _given(node).items():
        sources: list[fx.Node] = []
        fx.map_arg(value, sources.append)
        if name != "input" and any(source.op != "get_attr" for source in sources):
            return name
    return None


def _given(node: fx.Node) -> dict[str, Any]:
    names = MULTIPLIES_WEIGHT[node.target]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _layer(
    kind: Any, settings: Mapping[str, Any], tensors: Mapping[str, Tensor | None]
) -> nn.Module:
    """The module of a class with these tensors, weight (outputs, inputs, ...) or transposed."""
    weight: Any = tensors["weight"]
    first, second, *kernel = weight.shape
    settings = {name: _for_each(kernel, value) for name, value in settings.items()}
    inputs, outputs = second * settings.get("groups", 1), first
    if issubclass(kind, nn.modules.conv._ConvTransposeNd):
        inputs, outputs = first, inputs
    sizes = (inputs, outputs, kernel) if kernel else (inputs, outputs)
    has_bias = tensors["bias"] is not None
    module: nn.Module = kind(*sizes, **settings, bias=has_bias, device="meta").eval()
    padding_in_numbers(module)
    return with_tensors(module, tensors)


def _for_each(kernel: list[int], value: Any) -> Any:
    """A setting for each dimension of a kernel, where it is one in a list."""
    is_single = isinstance(value, (tuple, list)) and len(value) == 1
    return tuple(value) * len(kernel) if is_single else value
