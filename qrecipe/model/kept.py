"""What qrecipe stores with a model, under a single name."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import fx, nn

from qrecipe.errors.findings import ArtifactError

_Kind = TypeVar("_Kind")

PRIVATE = "_qrecipe"
"""The attribute of a model, and the key in ``meta``, that qrecipe uses."""


def kept_with(model: nn.Module) -> dict[str, Any]:
    """The values that qrecipe stores with a model and its copies.

    Pickling keeps attributes, a deep copy of a graph module only ``meta``, so they are in both.
    """
    homes = [vars(model)]
    if isinstance(model, fx.GraphModule):
        homes.append(model.meta)
    kept: dict[str, Any] = next((home[PRIVATE] for home in homes if PRIVATE in home), {})
    for home in homes:
        home[PRIVATE] = kept
    return kept


def kept(model: object, key: str) -> Any:
    """One value that qrecipe stores with a model, or None."""
    if not isinstance(model, nn.Module):
        return None
    meta = model.meta if isinstance(model, fx.GraphModule) else {}
    homes = [vars(model).get(PRIVATE), meta.get(PRIVATE)]
    # the caller's model may use that name for something else
    return next((home[key] for home in homes if isinstance(home, dict) and key in home), None)


def required(model: object, key: str, kind: type[_Kind], what: str, hint: str) -> _Kind:
    """As `kept`. Raises ``ArtifactError`` (QR501) for a model that has no such value."""
    found = kept(model, key)
    if isinstance(found, kind):
        return found
    raise ArtifactError.of("QR501", f"this {type(model).__name__} {what}", hint=hint)


PROVENANCE = "provenance"

TRANSFORMED = "transformed"
"""What a transformed model keeps of how it came to be."""
