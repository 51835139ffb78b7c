"""Calls that move numbers, but not integers: they have no kernel, or would widen the range.

A test reproduces each missing kernel with the installed torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from qrecipe.model.moving import arguments, last_name


def no_move(node: fx.Node) -> str | None:
    """Why the integers of a `moving.moved` call cannot be moved; None if they can."""
    limit = _LIMITS.get(last_name(node))
    return None if limit is None else limit(node)


def _padding(node: fx.Node) -> str | None:
    given = arguments(node)
    mode = given.get("mode", "constant")
    if mode not in ("constant", "reflect"):
        return f"quantized padding does not support mode = {mode!r}"
    if mode == "reflect" and len(given["pad"]) > 4:
        return "quantized padding does not reflect three dimensions"
    return _not_zero("pads with", given.get("value") or 0)


def _filling(node: fx.Node) -> str | None:
    return _not_zero("fills in", arguments(node).get("value"))


def _not_zero(what: str, value: Any) -> str | None:
    if isinstance(value, (bool, int, float)) and value == 0:
        return None
    return f"it {what} a number other than 0, which would widen the range of its input"


def _rolling(node: fx.Node) -> str | None:
    given = arguments(node)
    if _are_whole(given.get("shifts")) and _are_whole(given.get("dims")):
        return None
    return "integers are only rolled along given dimensions, by given numbers"


def _are_whole(value: Any) -> bool:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return bool(values) and all(isinstance(each, int) for each in values)


def _shuffling(node: fx.Node) -> str | None:
    if node.meta["value"].rank != 4:
        return "the channels of quantized tensors are only shuffled in four dimensions"
    return None


_LIMITS: Mapping[str, Callable[[fx.Node], str | None]] = {
    "channel_shuffle": _shuffling,
    "pad": _padding,
    "masked_fill": _filling,
    "roll": _rolling,
}
"""By the name of the function."""
