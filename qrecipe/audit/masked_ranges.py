"""Int8 sums whose range a mask takes, as calibration shows."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor, fx

from qrecipe.model.addresses import site_of
from qrecipe.model.masks import has_mask
from qrecipe.model.nodes import module_of


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
    observer = module_of(node)
    while hasattr(observer, "activation_post_process"):
        observer = observer.activation_post_process
    for name in ("min_val", "max_val"):
        end = getattr(observer, name, None)
        if isinstance(end, Tensor) and end.numel() == 1:
            yield float(end)
