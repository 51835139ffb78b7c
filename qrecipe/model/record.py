"""The record of a float model, with which another one can be compared."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypeAliasType

Value = Literal["float tensor", "tensor", "floats", "other"]
"""What a node computes: a floating-point tensor, another tensor, a tuple with some, or other."""


class Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TracedNode(Stored):
    """A node of a traced graph.

    ``call`` is its kind, target and arguments; ``rank`` is the number of dimensions of a tensor,
    ``count`` that of the results in a tuple; ``is_input`` tells that it is the node's first input
    itself, and ``is_finite`` that it has no infinite values.
    """

    name: str
    call: str
    value: Value
    rank: int | None
    is_input: bool
    is_finite: bool = True
    count: int | None = None


DType = Literal[
    "float16", "float32", "float64", "bfloat16", "bool", "uint8", "int8", "int16", "int32", "int64"
]


class Shape(Stored):
    """The shape and dtype of a tensor."""

    shape: tuple[Annotated[int, Field(ge=0, le=2**24)], ...]
    dtype: DType


Shapes = TypeAliasType("Shapes", "Shape | tuple[Shapes, ...] | dict[str, Shapes]")
"""The shape of a tensor, or those of what is in a list or tuple, or in a dict."""


class TracedPart(Stored):
    """A traced part of a model: the whole model (an empty path) or a root.

    ``constants`` are the arguments of its forward that were not tensors, ``shapes`` those that
    were.
    """

    path: str
    constants: dict[str, bool | int | float | str | None]
    nodes: tuple[TracedNode, ...]
    shapes: dict[str, Shapes] = {}


class Architecture(Stored):
    """What a float model must match, except for its weights.

    ``modules`` maps the paths of torch's own modules to their class and settings; ``graphs`` are
    digests of the converted graphs by the paths of the parts; ``opened`` are the paths of the
    layers that were opened before anything else.
    """

    parts: tuple[TracedPart, ...]
    modules: dict[str, str]
    graphs: dict[str, str] = {}
    opened: tuple[str, ...] = ()
