"""What a prepared model carries with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from qrecipe.errors.findings import CalibrationError, Finding
from qrecipe.fx.numerics import Sample
from qrecipe.inputs import Inputs
from qrecipe.recipe.recipe import Recipe
from qrecipe.recipe.schema import CalibrationTable, LintTable, QatTable

PRIVATE = "_qrecipe"
"""The attribute of a model, and the key in ``meta``, under which qrecipe keeps things."""

_KEY = "prepared"


@dataclass(slots=True)
class PreparedState:
    """What calibration and conversion need to know of a prepared model.

    ``origin`` stands for the `CompiledRecipe` that prepared it; ``parts`` are the paths of its
    parts; ``qat`` is the schedule where it was prepared for training; ``samples`` is what each part
    was given first in calibration and what it gave, ``later_calls`` the same of its further calls
    in the first batch; ``whole`` is what the model itself was given first, where its parts are
    roots. ``first_weight`` is what the first of ``batches`` weighs in moving averages, 0 to 1, if
    there are any; ``clipping`` tells what the ranges leave out where that costs much.
    """

    calibration: CalibrationTable
    lint: LintTable
    origin: str
    parts: tuple[str, ...]
    qat: QatTable | None
    samples: dict[str, Sample] = field(default_factory=dict)
    later_calls: dict[str, list[Sample]] = field(default_factory=dict)
    whole: Inputs | None = None
    batches: int = 0
    first_weight: float | None = None
    clipping: str | None = None


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


def mark_prepared(prepared: nn.Module, recipe: Recipe, origin: str, parts: Sequence[str]) -> None:
    """Let a model carry what calibration and conversion need."""
    schedule = recipe.qat if recipe.phase == "qat" else None
    kept_with(prepared)[_KEY] = PreparedState(
        recipe.calibration, recipe.lint, origin, tuple(parts), schedule
    )


def forget_preparation(converted: nn.Module) -> None:
    """A converted model keeps no calibration data."""
    kept_with(converted).pop(_KEY, None)


def prepared_state(model: object) -> PreparedState:
    """Raises ``CalibrationError`` (QR406) for what `CompiledRecipe.prepare` did not return."""
    state = kept(model, _KEY)
    if isinstance(state, PreparedState):
        return state
    raise CalibrationError(
        Finding(
            "QR406",
            f"this {type(model).__name__} was not prepared by qrecipe",
            hint="pass what CompiledRecipe.prepare() returned",
        )
    )
