"""Linear layers and convolutions in other spellings become modules: functions and products."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qrecipe.model.addresses import members_of
from qrecipe.model.nodes import call_instead, stored
from qrecipe.model.normalize import MULTIPLIES_WEIGHT, padding_in_numbers
from qrecipe.model.sharing import linear, with_tensors

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


_PRODUCTS = frozenset({torch.matmul, torch.mm, operator.matmul, "matmul", "mm"})
_SUMS = frozenset({torch.add, operator.add, operator.iadd, "add", "add_"})
_SWAPS = ((0, 1), (1, 0), (-1, -2), (-2, -1))
_TRANSPOSITIONS: Mapping[Any, tuple[Any, ...]] = {
    **dict.fromkeys(("t", torch.t), ((),)),
    **dict.fromkeys(("transpose", torch.transpose), _SWAPS),
    **dict.fromkeys(("permute", torch.permute), ((1, 0), ((1, 0),))),
    getattr: (("T",), ("mT",)),
}
"""The arguments, after the matrix, with which calls transpose it."""
_LINEAR = frozenset({"linear", "torch.nn.functional.linear"})


@dataclass(frozen=True, slots=True)
class _Product:
    """The calls that are one linear layer, in order; ``weight`` is (inputs, outputs)."""

    calls: tuple[fx.Node, ...]
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None = None


def products_as_linear(graph_module: fx.GraphModule) -> None:
    """Turn products with stored matrices into calls of linear layers, in place.

    They share the memory of the matrices. A sum with a stored vector becomes the bias. The names
    of the calls stay, but rules for linear layers cover them too.
    """
    products = list(_products(graph_module))
    for product in products:
        first, last = product.calls[0], product.calls[-1]
        last.meta = {**first.meta, **_members(product)}
        layer = linear(_transposed(product.weight), stored(product.bias))
        call_instead(last, layer, product.x)  # erases the product before a sum
    if products:
        graph_module.graph.eliminate_dead_code()
        graph_module.recompile()


def _members(product: _Product) -> dict[str, Any]:
    members = [member for call in product.calls for member in members_of(call)]
    if not members:
        return {}
    first = replace(members[0], functions=members[0].functions | _LINEAR)
    return {"member": first, "members": (first, *members[1:])}


def _products(graph_module: fx.GraphModule) -> Iterator[_Product]:
    for node in graph_module.graph.nodes:
        if node.op not in ("call_function", "call_method") or node.kwargs:
            continue
        if node.target in (torch.addmm, "addmm") and len(node.args) == 3:
            bias, x, weight = node.args
            found = _checked(_Product((node,), x, weight, bias))
        elif node.target in _PRODUCTS:
            found = _checked(_Product((node,), *node.args))
            found = found and _with_sum(found)
        else:
            continue
        if found is not None:
            yield found


def _checked(product: _Product) -> _Product | None:
    """The product if ``weight`` is a stored matrix, ``bias`` a stored vector, and ``x`` neither."""
    matrix, x = _matrix(product.weight), product.x
    if matrix is None or not isinstance(x, fx.Node):
        return None
    if x.op == "get_attr" or _turned(x) is not None:
        return None
    if product.bias is None:
        return product
    bias = stored(product.bias)
    is_vector = isinstance(bias, Tensor) and bias.shape == (matrix.shape[1],)
    return product if is_vector and bias.is_floating_point() else None


def _with_sum(product: _Product) -> _Product:
    """The product together with the addition of its bias, if that is all that reads it."""
    (node,) = product.calls
    users = list(node.users)
    if len(users) != 1 or users[0].target not in _SUMS or users[0].kwargs:
        return product
    bias = next((arg for arg in users[0].args if arg is not node), None)
    with_sum = replace(product, calls=(node, users[0]), bias=bias)  # type: ignore[arg-type]
    found = None if bias is None else _checked(with_sum)
    return found or product


def _matrix(node: Any) -> Tensor | None:
    """The stored matrix that a node reads, transposed or not."""
    turned = _turned(node)
    tensor = stored(node if turned is None else turned)
    if not isinstance(tensor, Tensor) or tensor.dim() != 2 or not tensor.is_floating_point():
        return None
    return tensor if turned is None else tensor.t()


def _turned(node: Any) -> fx.Node | None:
    """The stored matrix that a node transposes, if it does."""
    if not isinstance(node, fx.Node) or not node.args or node.kwargs:
        return None
    source, *dims = node.args
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    return source if tuple(dims) in _TRANSPOSITIONS.get(node.target, ()) else None


def _transposed(weight: fx.Node) -> Tensor:
    """A stored matrix as (outputs, inputs), on the same memory."""
    turned = _turned(weight)
    if turned is not None:
        matrix: Tensor = stored(turned)
        return matrix
    matrix = stored(weight)
    transposed = matrix.detach().t()
    is_parameter = isinstance(matrix, nn.Parameter)
    return nn.Parameter(transposed, matrix.requires_grad) if is_parameter else transposed
