"""Numbers in a graph, which torch's ``prepare`` must not observe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx

from qrecipe._torch_fx import all_node_args_have_no_tensors, prepare
from qrecipe.process.state import alone, replaced


@contextmanager
def numbers_unobserved() -> Iterator[None]:
    """Inside, ``prepare`` takes for numbers what was recorded as one, and nothing else.

    torch tells numbers by the names of what gives them, and knows ``size``, ``shape`` and ``ndim``
    but neither ``dim`` nor ``numel``. Its observers fail on numbers. What is made of numbers alone,
    as ``torch.zeros(1, n)`` is, it takes for a number, and fails where a kernel reads it.
    """
    with alone(), replaced(prepare.__globals__, {"all_node_args_have_no_tensors": _is_no_tensor}):
        yield


def _is_no_tensor(node: Any, modules: Any, cache: Any) -> bool:
    value = node.meta.get("value") if isinstance(node, fx.Node) else None
    if value is not None and (value.is_float or not value.is_tensor):
        return not value.is_float
    is_none: bool = all_node_args_have_no_tensors(node, modules, cache)
    return is_none
