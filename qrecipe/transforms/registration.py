"""Names for transforms of users and plugins."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel

from qrecipe.observers.registration import callers_module, decorator
from qrecipe.transforms.contract import contract_findings

_C = TypeVar("_C", bound=type)


def register_transform(name: str, *, options: type[BaseModel] | None = None) -> Callable[[_C], _C]:
    """Make a subclass of `Transform` available to recipes as ``[transform.name]``; a decorator.

    The arguments that a recipe may give are those of ``__init__``, or of ``options``, a Pydantic
    model that also validates them. The class is tried on a small model. Registering a class of the
    same module and qualified name again replaces it.

    Raises:
        PluginError: the name is taken (QR151), or the class breaks the contract (QR150).
    """
    return decorator(
        "transform", name, options, callers_module(), lambda cls: contract_findings(name, cls)
    )
