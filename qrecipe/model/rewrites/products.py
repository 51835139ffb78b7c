"""Products with a stored matrix, such as ``x @ self.weight + self.bias``, are linear layers."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe.model.addresses import members_of
from qrecipe.model.nodes import call_instead, erase_unread, stored
from qrecipe.model.sharing import linear

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
        bias = stored(product.bias)
        call_instead(last, linear(_transposed(product.weight), bias), product.x)
        erase_unread(product.calls[:-1])
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
