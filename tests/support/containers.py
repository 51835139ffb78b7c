"""Containers of every kind around one tensor, for batches and outputs."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field, fields
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import PackedSequence


@dataclass
class Plain:
    y: Any


@dataclass(frozen=True, slots=True)
class Frozen:
    y: Any
    note: str = "kept"


@dataclass
class Derived:
    """Its constructor computes, and would compute again."""

    y: Any
    twice: Any = field(init=False)
    unset: Any = field(init=False)
    scale: InitVar[float] = 2.0

    def __post_init__(self, scale):
        self.y = self.y * scale
        self.twice = self.y * 2


class Dict(dict):
    pass


class Named(dict):
    """A dict that is made in its own way, and knows more than its items."""

    def __init__(self, *, y):
        super().__init__(y=y)
        self.note = "kept"


class Attributes(dict):
    """Its attributes are its items."""

    def __init__(self, **items):
        super().__init__(**items)
        self.__dict__ = self


class Lenient(dict):
    """It has every attribute that one asks for."""

    __getattr__ = dict.get


class Encoding(UserDict):
    """As transformers' BatchEncoding: the items are attributes too."""

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getstate__(self):
        return {"data": self.data}

    def __setstate__(self, state):
        self.data = state["data"]


class Stored(Mapping):
    """A mapping with a storage of its own."""

    def __init__(self, **values):
        self._values = values

    def __getitem__(self, key):
        return self._values[key]

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)


class ModelOutput(OrderedDict):
    """As the outputs of transformers: a mapping, a dataclass and indexable by position."""

    def __post_init__(self):
        for each in fields(self):
            if getattr(self, each.name) is not None:
                self[each.name] = getattr(self, each.name)

    def __getitem__(self, key):
        return dict(self.items())[key] if isinstance(key, str) else tuple(self.values())[key]

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self):
        return (type(self), tuple(getattr(self, each.name) for each in fields(self)))


@dataclass
class Output(ModelOutput):
    y: Any = None
    pooled: Any = None


class Pair(NamedTuple):
    y: Any
    note: str = "kept"


class OwnPair(Pair):
    def __new__(cls, y):
        return super().__new__(cls, y)


class List(list):
    pass


def packed(y):
    return PackedSequence(y, torch.tensor([len(y)]))


MAPPINGS = {
    "dict": lambda y: {"y": y},
    "ordered_dict": lambda y: OrderedDict(y=y),
    "defaultdict": lambda y: defaultdict(list, y=y),
    "dict_subclass": lambda y: Dict(y=y),
    "dict_with_its_own_constructor": lambda y: Named(y=y),
    "dict_with_attributes": lambda y: Attributes(y=y),
    "dict_with_any_attribute": lambda y: Lenient(y=y, note="kept"),
    "user_dict": lambda y: UserDict(y=y),
    "batch_encoding": lambda y: Encoding(y=y),
    "mapping": lambda y: Stored(y=y),
    "mapping_proxy": lambda y: MappingProxyType({"y": y}),
    "model_output": lambda y: Output(y=y),
}

OTHERS = {
    "tuple": lambda y: (y,),
    "list": lambda y: [y],
    "list_subclass": lambda y: List([y]),
    "deque": lambda y: deque([y]),
    "named_tuple": Pair,
    "named_tuple_subclass": OwnPair,
    "dataclass": Plain,
    "frozen_dataclass_with_slots": Frozen,
    "dataclass_that_computes": Derived,
    "nested": lambda y: {"a": [Plain(Dict(y=(Frozen(y),)))], "n": None, "i": 3},
}

CONTAINERS = {**MAPPINGS, **OTHERS}
