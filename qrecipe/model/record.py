"""What is recorded of a float model, so that another can be held against it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Value = Literal["float tensor", "tensor", "floats", "other"]
"""What a node computes: a floating tensor, another one, a tuple that holds some, anything else."""


class Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TracedNode(Stored):
    """A node of a graph as it was traced; ``call`` is its kind, target and arguments."""

    name: str
    call: str
    value: Value


class TracedPart(Stored):
    """A part of a model as it was traced: the whole model (an empty path) or a root.

    ``constants`` are the arguments of its forward that were no tensors.
    """

    path: str
    constants: dict[str, bool | int | float | str | None]
    nodes: tuple[TracedNode, ...]


class Architecture(Stored):
    """What the float model has to be again, weights apart.

    ``modules`` maps the path of each module of torch's own to its class and settings;
    ``graphs`` are digests of the converted graphs, by the paths of the parts.
    """

    parts: tuple[TracedPart, ...]
    modules: dict[str, str]
    graphs: dict[str, str] = {}
