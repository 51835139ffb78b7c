"""What a mask is: numbers so low that all else is nothing beside them."""

from __future__ import annotations

from collections.abc import Iterable

LOWEST = -1e3
"""Activations are hardly ever below; masks are at -1e4, -1e9 or the lowest float."""

_NOTHING = 0.01
"""Of a tensor with 8 bits, this share of the range is two or three integers."""


def has_mask(ends: Iterable[float]) -> bool:
    """Whether one of two tensors is a mask, by the smallest and largest numbers of both."""
    lowest, *others = sorted(ends)
    return lowest < LOWEST and max(map(abs, others)) < _NOTHING * -lowest
