"""Names for transforms, and their contract: tried at registration and on every model later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from qrecipe._torch_ao import quiet
from qrecipe.errors.findings import ExecutionError, Finding, QRecipeError
from qrecipe.errors.text import first_line, one_line, shown
from qrecipe.execution.calls import Feed
from qrecipe.model.call import Inputs
from qrecipe.model.copies import whole_copy
from qrecipe.observers.registration import callers_module, decorator
from qrecipe.planning.decide import make_plan
from qrecipe.planning.inventory import inventory_of
from qrecipe.process.neutral import neutral
from qrecipe.process.state import random_numbers_kept
from qrecipe.recipe.recipe import parse_recipe
from qrecipe.transforms.base import Transform, TransformContext
from qrecipe.transforms.proof import (
    changed_modules,
    classes_of,
    difference,
    facts_of,
    outputs_of,
    reached_too_far,
)

_LONGEST_MESSAGE = 200

_MOST = 0.1
"""The largest tolerance: more is another model."""

_RECIPE = """
format = 1
extends = "builtin:x86-static-minmax"
"""


def applied(
    step: Transform, model: nn.Module, context: TransformContext
) -> tuple[tuple[str, ...], str | None]:
    """Apply a plugin's transform in place: the modules that it changed, and what it must not do.

    Raises ``ExecutionError`` (QR418) if it fails.
    """
    before, classes = facts_of(model), classes_of(model)
    try:
        with random_numbers_kept():
            step.apply(model, context)
    except QRecipeError:
        raise
    except Exception as error:
        raise ExecutionError.of(
            "QR418",
            f"the transform {type(step).__name__} fails: {_said(error)}",
            hint="remove it from the recipe, or report it to the author of the plugin",
        ) from error
    after = facts_of(model)
    problem = reached_too_far(before, after, (classes, classes_of(model)))
    return (() if problem else changed_modules(before, after)), problem


@neutral
def contract_findings(name: str, cls: object) -> list[Finding]:
    """What is wrong with ``cls`` as a transform called ``name``."""
    title = f"transform {shown(name)}"
    with quiet(), random_numbers_kept():
        return [Finding("QR150", f"{title} {what}", hint=mend) for what, mend in _problems(cls)]


def _problems(cls: Any) -> Iterator[tuple[str, str]]:
    if not (isinstance(cls, type) and issubclass(cls, Transform)):
        given = cls.__qualname__ if isinstance(cls, type) else repr(cls)
        yield (
            f"is {given}, which is not a subclass of Transform",
            "derive it from qrecipe.Transform",
        )
        return
    try:
        step = cls()
    except Exception as error:
        yield f"cannot be created: {_said(error)}", "give all arguments of __init__ a default"
        return
    tolerance: Any = step.tolerance
    is_number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if not is_number or not 0 <= tolerance <= _MOST:
        mend = f"set tolerance to a number from 0 to {_MOST}"
        yield f"declares the tolerance {shown(str(tolerance))}", mend
        return
    model, batches = _small_model()
    inputs, recipe = Inputs.from_batch(batches[0]), parse_recipe(_RECIPE)
    inventory = inventory_of(model, recipe, inputs)
    plan = make_plan(inventory, recipe)
    context = TransformContext(plan, inventory, Feed(batches))
    changed = whole_copy(model)
    try:
        _, problem = applied(step, changed, context)
    except QRecipeError as error:
        yield f"fails on a small model: {error.findings[0].message}", "mend its apply"
        return
    if problem is not None:
        yield f"changes more than numbers of a small model: {problem}", "change tensors in place"
        return
    before, after = (outputs_of(each, batches[0], None) for each in (model, changed))
    problem = difference(before, after, step.tolerance)
    if problem is not None:
        yield (
            f"changes what a small model computes: {problem}",
            "undo in one layer what it does to another, or declare a tolerance",
        )


def _small_model() -> tuple[nn.Module, list[Tensor]]:
    """Convolutions with a BatchNorm, a LayerNorm and linear layers, and batches of images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LayerNorm(16)),
        *(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)),
    )
    for norm in (model[1], model[8]):
        for tensor in (*norm.parameters(), *norm.buffers()):
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5, 2)  # or a fault may cancel out
    return model.eval(), [torch.randn(4, 3, 8, 8) for _ in range(2)]


def _said(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {first_line(error)}")[:_LONGEST_MESSAGE]


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
