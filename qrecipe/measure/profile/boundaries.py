"""The tensors that a converted graph quantizes or dequantizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

from qrecipe.model.addresses import is_conversion, site_of
from qrecipe.rules.structure import joined

Direction = Literal["quantize", "dequantize"]


@dataclass(frozen=True, slots=True)
class Boundary:
    """One tensor, named after the site that computes it or the input that it is."""

    direction: Direction
    tensor: str


def input_name(path: str, name: str) -> str:
    """The tensor that is an input of a part, the whole model (an empty path) or a root."""
    return f"input {joined(path, name)}"


def boundary_of(node: fx.Node, path: str) -> Boundary | None:
    """The boundary that a node of the converted graph at a path crosses, if it crosses one."""
    if not is_conversion(node):
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    direction: Direction = "dequantize" if node.op == "call_method" else "quantize"
    if source.op == "placeholder":
        return Boundary(direction, input_name(path, str(source.target)))
    return Boundary(direction, site_of(source) or joined(path, source.name))
