"""Branches that are joined on one scale although their ranges differ, as those of masks do."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from qrecipe._torch_ao import innermost
from qrecipe.audit.moving_averages import span
from qrecipe.audit.sample import Sample
from qrecipe.errors.findings import Finding
from qrecipe.model.addresses import site_of
from qrecipe.model.call import bind
from qrecipe.model.interpreter import Interpreter
from qrecipe.model.masks import has_mask
from qrecipe.model.nodes import module_of
from qrecipe.model.rewrite_proof import passing
from qrecipe.model.same_graph import observes

_JOINS = (torch.cat, torch.stack, torch.ops.aten.cat.default, torch.ops.aten.stack.default)

WIDE_RATIO = 16.0
"""A branch this much narrower than another loses 4 bits."""


def branch_findings(part: fx.GraphModule, sample: Sample) -> Iterator[Finding]:
    """Quantized joins in a prepared part whose branches differ much in range (QR206).

    torch gives all branches one observer; a moving average swings between them.
    """
    if not any(map(_is_quantized_join, part.graph.nodes)):
        return
    with torch.no_grad():
        ranges = _Ranges(passing(part))
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


def _is_quantized_join(node: fx.Node) -> bool:
    """Whether its branches and its result are observed; a dynamic kernel observes its input."""
    if node.target not in _JOINS:
        return False
    return any(map(observes, node.all_input_nodes)) and any(map(observes, node.users))


class _Ranges(Interpreter):
    """Notes the spans of the inputs of each join."""

    def __init__(self, part: fx.GraphModule) -> None:
        super().__init__(part)
        self.spans: dict[str, list[float]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if _is_quantized_join(n):
            (branches, *_), _ = self.fetch_args_kwargs_from_env(n)
            ranges = [x.aminmax() for x in branches if isinstance(x, Tensor) and x.numel()]
            spans = [span((float(low), float(high))) for low, high in ranges]
            self.spans[site_of(n) or n.name] = spans
        return super().run_node(n)


def masked_sums(part: fx.GraphModule, sums: Collection[str]) -> Iterator[str]:
    """Those of some sums in a calibrated part of which one input is a mask."""
    for node in part.graph.nodes:
        name = site_of(node)
        if name is not None and name in sums:
            ends = [end for source in node.all_input_nodes for end in _ends(source)]
            if len(ends) == 4 and has_mask(ends):
                yield name


def _ends(node: fx.Node) -> Iterator[float]:
    """What an observer found; nothing for any other node."""
    observer = innermost(module_of(node))
    for name in ("min_val", "max_val"):
        end = getattr(observer, name, None)
        if isinstance(end, Tensor) and end.numel() == 1:
            yield float(end)
