"""Copies of converted models, whose sites run on the engines of the plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from qrecipe.execution.engine import engine
from qrecipe.execution.packing import packed_convolution, packed_sites
from qrecipe.planning.plan import Engine

_ENGINES = "qrecipe_engines"
"""The engines of sites in the ``meta`` of a graph module, which its copies keep."""


def keep_engines(converted: nn.Module, engines: Mapping[str, Engine]) -> None:
    """Let ``copy.deepcopy`` of the model pack weights for the engines of their sites.

    torch packs the weights of a copy for the current engine, whose kernel may be wrong or slow.
    """
    if not engines:
        return
    for module in converted.modules():
        if isinstance(module, fx.GraphModule):
            module.meta[_ENGINES] = dict(engines)
            _copy_with_engines(module)


def _copy_with_engines(graph_module: fx.GraphModule) -> None:
    # each graph module has a class of its own
    type(graph_module).__deepcopy__ = _copied  # type: ignore[method-assign]


def _copied(self: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
    copied = fx.GraphModule.__deepcopy__(self, memo)
    engines = copied.meta[_ENGINES]
    for (source, name, site), (target, own_name, _) in zip(
        packed_sites(self), packed_sites(copied), strict=True
    ):
        packed = getattr(source, name)
        if site in engines and getattr(target, own_name) is not packed:
            weight, bias = packed.unpack()
            with engine(engines[site]):
                setattr(target, own_name, packed_convolution(packed, weight, bias))
    _copy_with_engines(copied)
    return copied
