"""Branches that are joined on one scale although their ranges differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from qrecipe._torch_ao import is_observer
from qrecipe.audit.sample import Sample
from qrecipe.errors.findings import Finding
from qrecipe.model.addresses import site_of
from qrecipe.model.call import bind

_JOINS = (torch.cat, torch.stack)

WIDE_RATIO = 16.0
"""A branch this much narrower than another loses 4 bits."""


def branch_findings(part: fx.GraphModule, sample: Sample) -> Iterator[Finding]:
    """Quantized joins in a prepared part whose branches differ much in range (QR206).

    torch gives all branches one observer; a moving average swings between them.
    """
    if not any(_is_quantized_join(node, part) for node in part.graph.nodes):
        return
    with torch.no_grad():
        ranges = _Ranges(part)
        ranges.run(*bind(part, part, sample.inputs))
    for name, spans in ranges.spans.items():
        narrow, wide = min(spans, default=0.0), max(spans, default=0.0)
        if wide > WIDE_RATIO * narrow:
            yield Finding(
                "QR206",
                f"the branches of {name} have ranges of {narrow:.3g} and {wide:.3g} on the first "
                "batch, and share one scale",
                hint='leave it float, or observe its inputs with "minmax", which does not swing',
            )


def _span(x: Tensor) -> float:
    """The width of a range as a scale covers it, zero included."""
    return max(float(x.max()), 0.0) - min(float(x.min()), 0.0)


def _is_quantized_join(node: fx.Node, part: fx.GraphModule) -> bool:
    return node.target in _JOINS and any(
        user.op == "call_module" and is_observer(part.get_submodule(str(user.target)))
        for user in node.users
    )


class _Ranges(fx.Interpreter):
    """Runs a prepared graph without observing, and notes the inputs of each join."""

    def __init__(self, part: fx.GraphModule) -> None:
        super().__init__(part)
        self.spans: dict[str, list[float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "call_module":
            module = self.module.get_submodule(str(n.target))
            return args[0] if is_observer(module) else module(*args, **kwargs)
        assert isinstance(self.module, fx.GraphModule)
        if _is_quantized_join(n, self.module):
            tensors = [x for x in args[0] if isinstance(x, Tensor) and x.numel()]
            self.spans[site_of(n) or n.name] = [_span(x) for x in tensors]
        return super().run_node(n)
