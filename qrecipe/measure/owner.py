"""Whose log of finished pieces a measurement can use."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from qrecipe.execution.batches import batches_digest
from qrecipe.model.digest import model_digest
from qrecipe.planning.plan import Plan
from qrecipe.pool.log import Owner
from qrecipe.pool.parcel import environment
from qrecipe.process.threads import TorchSettings


def owner_of(
    work: str,
    plan: Plan,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    functions: Mapping[str, Callable[..., Any] | None],
    settings: Mapping[str, str] | None = None,
) -> Owner:
    """What the pieces of a measurement depend on; it reads the batches once.

    The caller's functions count by their names.
    """
    # a model's code counts by the sites that are found in it
    sites = [(site.name, site.op, site.members, site.reads) for site in plan.sites]
    names = [f"{role} {name_of(each)}" for role, each in functions.items() if each is not None]
    return Owner(
        work,
        {
            "another recipe": plan.fingerprint,
            "another model": model_digest(model),
            "other sites": hashlib.sha256(repr(sites).encode()).hexdigest(),
            "other batches": batches_digest(batches),
        },
        {
            **environment(),
            **TorchSettings.here().words,
            "functions": ", ".join(names) or "none",
            **(settings or {}),
        },
    )


def name_of(function: Callable[..., Any]) -> str:
    """What a function of the caller is called, or its class."""
    return getattr(function, "__name__", type(function).__name__)
