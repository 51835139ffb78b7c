"""Numbers in a graph, which torch's ``prepare`` must not observe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx

from qrecipe._torch_fx import all_node_args_have_no_tensors, prepare
from qrecipe.execution.fx.repetition import replaced
from qrecipe.process.state import alone


@contextmanager
def numbers_unobserved() -> Iterator[None]:
    """Inside, ``prepare`` observes no node that was recorded as a number.

    torch tells numbers by the names of what gives them, and knows ``size``, ``shape`` and ``ndim``
    but neither ``dim`` nor ``numel``. Its observers fail on numbers.
    """
    with alone(), replaced(prepare.__globals__, {"all_node_args_have_no_tensors": _is_no_tensor}):
        yield


def _is_no_tensor(node: Any, modules: Any, cache: Any) -> bool:
    value = node.meta.get("value") if isinstance(node, fx.Node) else None
    if value is not None and not value.is_tensor and not value.is_float:
        return True
    is_none: bool = all_node_args_have_no_tensors(node, modules, cache)
    return is_none
