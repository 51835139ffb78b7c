"""The tensors that a converted graph quantizes or dequantizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

from qrecipe.model.addresses import is_conversion, site_of

Direction = Literal["quantize", "dequantize"]


@dataclass(frozen=True, slots=True)
class Boundary:
    """One tensor, named after the site that computes it or the input that it is."""

    direction: Direction
    tensor: str


def boundary_of(node: fx.Node) -> Boundary | None:
    """The boundary that a node of a converted graph crosses, if it crosses one."""
    if not is_conversion(node):
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    tensor = site_of(source) or (f"input {source.target}" if source.op == "placeholder" else "")
    return Boundary("dequantize" if node.op == "call_method" else "quantize", tensor or source.name)
