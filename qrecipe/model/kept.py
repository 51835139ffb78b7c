"""What qrecipe keeps with a model, under one name of its own."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

PRIVATE = "_qrecipe"
"""The attribute of a model, and the key in ``meta``, under which qrecipe keeps things."""


def kept_with(model: nn.Module) -> dict[str, Any]:
    """What qrecipe keeps with a model, under one name of its own; copies of the model have it too.

    A pickled model has its attributes, a deep copy of a graph module ``meta`` alone: it is in both.
    """
    homes = [vars(model)]
    if isinstance(model, fx.GraphModule):
        homes.append(model.meta)
    kept: dict[str, Any] = next((home[PRIVATE] for home in homes if PRIVATE in home), {})
    for home in homes:
        home[PRIVATE] = kept
    return kept


def kept(model: object, key: str) -> Any:
    """One thing that qrecipe keeps with a model; None where it keeps none."""
    if not isinstance(model, nn.Module):
        return None
    meta = model.meta if isinstance(model, fx.GraphModule) else {}
    homes = [vars(model).get(PRIVATE), meta.get(PRIVATE)]
    # a model of the caller's may have another thing under that name
    return next((home[key] for home in homes if isinstance(home, dict) and key in home), None)


PROVENANCE = "provenance"
