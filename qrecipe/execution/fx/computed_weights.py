"""Weights that are computed while training, which torch's ``convert`` must leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx

from qrecipe._torch_fx import collect_producer_nodes, convert
from qrecipe.process.state import alone, replaced


@contextmanager
def computed_weights_left_alone() -> Iterator[None]:
    """Inside, ``convert`` does not run what computes weights, in which it misses lists and pieces.

    It runs what a weight is made of, to let its observer see the weight. A computed one has none.
    """
    ours = {"collect_producer_nodes": _producers}
    with alone(), replaced(convert.__globals__, ours):
        yield


def _producers(node: fx.Node) -> Any:
    found = collect_producer_nodes(node)
    is_complete = found is not None and all(
        source in found for each in found for source in each.all_input_nodes
    )
    return found if is_complete else None
