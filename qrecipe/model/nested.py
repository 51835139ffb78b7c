"""Nested values: how batches and outputs are traversed.

Containers are mappings, tuples, lists, deques, dataclasses, and classes that are registered with
torch's pytree. Everything else is a leaf: tensors, and objects that are not looked into.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

from qrecipe.errors.text import first_line

_LEAVES = (fx.Proxy, Tensor, nn.Module, str, bytes, int, float, complex, type, type(None))
_SEQUENCES = (tuple, list)
_MAPPINGS = (dict, OrderedDict, MappingProxyType)
_OF_FX: Mapping[type, type] = {immutable_list: list, immutable_dict: dict}


def container_of(value: Any) -> type:
    """The type of a value; the usual one for FX's own lists and dicts."""
    return _OF_FX.get(type(value), type(value))


def parts_of(value: Any) -> Mapping[Any, Any] | None:
    """The contents of a container by key, field or position; None for a leaf."""
    if isinstance(value, _LEAVES):
        return None
    if isinstance(value, (tuple, list, deque)):
        return dict(enumerate(value))
    if isinstance(value, (dict, Mapping)):  # dict first: the check of an abstract class is slow
        return dict(value.items())
    if is_dataclass(value):
        # a field that is not in the constructor may not be set yet
        names = [field.name for field in fields(value) if hasattr(value, field.name)]
        return {name: getattr(value, name) for name in names}
    children = pytree.tree_flatten(value, is_leaf=lambda each: each is not value)[0]
    is_leaf = len(children) == 1 and children[0] is value
    return None if is_leaf else dict(enumerate(children))


def leaves(value: Any) -> Iterator[Any]:
    """The leaves of a value, in order; references of a container to itself are skipped."""
    return _leaves(value, frozenset())


def _leaves(value: Any, around: frozenset[int]) -> Iterator[Any]:
    parts = parts_of(value)
    if parts is None:
        return iter((value,))
    if id(value) in around:
        return iter(())
    inner = around | {id(value)}
    return chain.from_iterable(_leaves(part, inner) for part in parts.values())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a value, in order."""
    return (leaf for leaf in leaves(value) if isinstance(leaf, Tensor))


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, in a last dimension of 2; others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


class UncopyableError(TypeError):
    """A container of the caller's own class that cannot be copied; says why."""


def map_leaves(change: Callable[[Any], Any], value: Any) -> Any:
    """A copy of the containers with ``change`` applied to each leaf; FX's own become usual ones.

    Raises `UncopyableError` if a container cannot be copied.
    """
    parts = parts_of(value)
    if parts is None:
        return change(value)
    changed = {key: map_leaves(change, part) for key, part in parts.items()}
    kind: Any = container_of(value)
    if kind in _SEQUENCES:
        return kind(changed.values())
    if kind in _MAPPINGS:
        return kind(changed)
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(changed.values())
    try:
        # not every class can be built from its parts, but it can be copied and its parts replaced
        made = copy.deepcopy(value, {id(part): changed[key] for key, part in parts.items()})
        if getattr(value, "__dict__", None) is value:  # the usual dict with attributes for items
            made.__dict__ = made
    except Exception as error:
        text = f"a {type(value).__name__} cannot be copied: {first_line(error)}"
        raise UncopyableError(text) from error
    return made


def map_tensors(change: Callable[[Tensor], Any], value: Any) -> Any:
    """Like `map_leaves`, but for tensors only; other leaves are shared."""
    return map_leaves(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, value)


def cloned(value: Any) -> Any:
    """The value with all tensors cloned."""
    return map_tensors(Tensor.clone, value)


class Packing:
    """Builds containers like a given one, with other values for some leaves.

    A graph calls it where the model builds a container of its own class; no constructor is run.
    ``open_leaves`` are the leaves that it takes as arguments.
    """

    def __init__(self, like: Any, is_open: Callable[[Any], bool]) -> None:
        self.open_leaves = list(filter(is_open, leaves(like)))
        places = iter(range(len(self.open_leaves)))
        self._like = map_leaves(lambda leaf: _Place(next(places)) if is_open(leaf) else leaf, like)
        self.__name__ = type(like).__name__
        self.__qualname__ = f"{type(like).__module__}.{type(like).__qualname__}"

    def __call__(self, *values: Any) -> Any:
        return map_leaves(
            lambda leaf: values[leaf.index] if isinstance(leaf, _Place) else leaf, self._like
        )


class _Place:
    """A placeholder for a leaf."""

    def __init__(self, index: int) -> None:
        self.index = index
