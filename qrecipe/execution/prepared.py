"""The state that a prepared model carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx, nn

from qrecipe.audit.sample import Sample
from qrecipe.errors.findings import CalibrationError
from qrecipe.model.call import Inputs
from qrecipe.model.kept import kept, kept_with
from qrecipe.recipe.recipe import Recipe
from qrecipe.recipe.schema import CalibrationTable, LintTable, QatTable

_KEY = "prepared"


@dataclass(slots=True)
class PreparedState:
    """What calibration and conversion need to know of a prepared model.

    ``fingerprint`` is the recipe's; ``origin`` stands for the `CompiledRecipe` that prepared it;
    ``parts`` are the paths of its parts; ``given`` are the inputs that the example had, if it is
    traced for these; ``qat`` is the schedule where it was prepared for
    training; ``samples`` is what each part was given first in calibration and what it gave,
    ``later_calls`` the same of its further calls in the first batch; ``whole`` is what the model
    itself was given first, where its parts are roots. ``first_weight`` is what the first of
    ``batches`` weighs in moving averages, 0 to 1, if there are any; ``clipping`` tells what the
    ranges leave out where that costs much. ``sums`` are the int8 sums of which calibration tells
    whether a mask takes their range.
    """

    fingerprint: str
    calibration: CalibrationTable
    lint: LintTable
    origin: str
    parts: tuple[str, ...]
    qat: QatTable | None
    given: tuple[str, ...] = ()
    samples: dict[str, Sample] = field(default_factory=dict)
    later_calls: dict[str, list[Sample]] = field(default_factory=dict)
    whole: Inputs | None = None
    batches: int = 0
    first_weight: float | None = None
    clipping: str | None = None
    sums: tuple[str, ...] = ()


def mark_prepared(
    prepared: nn.Module,
    recipe: Recipe,
    origin: str,
    parts: Sequence[str],
    given: tuple[str, ...] = (),
) -> None:
    """Attach what calibration and conversion need to a model."""
    schedule = recipe.qat if recipe.phase == "qat" else None
    kept_with(prepared)[_KEY] = PreparedState(
        recipe.fingerprint, recipe.calibration, recipe.lint, origin, tuple(parts), schedule, given
    )


def forget_preparation(converted: nn.Module) -> None:
    """Remove the calibration data from a converted model."""
    kept_with(converted).pop(_KEY, None)


def prepared_state(model: object) -> PreparedState:
    """Raises ``CalibrationError`` (QR406) for what `CompiledRecipe.prepare` did not return."""
    state = kept(model, _KEY)
    if isinstance(state, PreparedState):
        return state
    raise CalibrationError.of(
        "QR406",
        f"this {type(model).__name__} was not prepared by qrecipe",
        hint="pass the model that CompiledRecipe.prepare() returned",
    )


def traced_parts(prepared: nn.Module) -> dict[str, fx.GraphModule]:
    """The parts of a prepared model that are graphs with observers in them, by their paths."""
    parts = {path: prepared.get_submodule(path) for path in prepared_state(prepared).parts}
    return {path: part for path, part in parts.items() if isinstance(part, fx.GraphModule)}
