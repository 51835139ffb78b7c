"""Check whether the ranges that a converted model has stored still fit the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from qrecipe.errors.findings import CalibrationError, ExecutionError, Finding
from qrecipe.errors.text import counted
from qrecipe.errors.warn import warn
from qrecipe.execution.batches import Forward, no_batches
from qrecipe.execution.calls import Feed
from qrecipe.execution.engine import engine_of
from qrecipe.execution.provenance import Provenance, converted_graphs, provenance
from qrecipe.execution.shards import Turns, check_mergeable
from qrecipe.measure.drift.report import Drift, worst_first
from qrecipe.measure.drift.today import Observing, Shadowed
from qrecipe.model.copies import with_parts
from qrecipe.planning.plan import Plan
from qrecipe.process import ranks
from qrecipe.process.neutral import neutral
from qrecipe.recipe.extends import compose
from qrecipe.recipe.references import Source
from qrecipe.recipe.schema import LintTable, RecipeTable
from qrecipe.runtimes.table import known_session
from qrecipe.terminal.progress import Progress

_LABEL = "measuring drift"


@neutral
@ranks.together
def drift(
    converted: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    progress: Progress | bool | None = None,
) -> Drift:
    """Compare new data with the ranges that the model has stored, tensor by tensor.

    Each batch runs through the converted model and also through the same graph in float, with the
    kernels' quantized weights. The recipe's observers see the float values, as in calibration, and
    find today's ranges (a moving average gives all batches the same weight). The same values give
    the share that the stored range clips, and the SQNR with the stored and with today's range.

    ``converted`` comes from `qrecipe.quantize` or `qrecipe.load_quantized`; ``batches`` and
    ``forward`` are as in `qrecipe.calibrate`. Memory does not grow with the batches. In an
    initialized process group of torch.distributed, all ranks call it, each with its own batches,
    and get the report on all batches.

    Raises:
        ArtifactError: ``converted`` was not converted by qrecipe (QR501).
        CalibrationError: there are no batches, none has values, or the model cannot take one; ranks
            with another model, or that failed (QR409).
        ExecutionError: the model has no stored ranges (QR430): it is dynamic or float, or a
            session of another runtime.
    """
    known = known_session(converted)
    if known is not None:
        raise _outputs_alone(type(converted).__name__)
    plan = Plan.from_json(provenance(converted).plan)
    observing = Observing()
    shadows = {
        path: Shadowed(part, plan, observing) for path, part in converted_graphs(converted).items()
    }
    if not any(shadow.tallies for shadow in shadows.values()):
        raise _nothing_stored()
    _warn_about(observing, converted)
    model = with_parts(converted, shadows)
    feed = Feed(batches, forward, progress=progress)
    with engine_of(plan):
        if ranks.count() == 1:
            count = sum(1 for _ in feed.runs(model, _LABEL))
        else:
            count = _run_in_turn(model, feed, list(shadows.values()), provenance(converted))
    if not count:
        raise no_batches()
    sites = [site for shadow in shadows.values() for site in shadow.results()]
    if all(site.is_unseen for site in sites):
        raise _no_values(count)
    return Drift(tuple(sorted(sites, key=worst_first)), count, plan.ingredients)


def _run_in_turn(
    model: nn.Module, feed: Feed, shadows: Sequence[Shadowed], origin: Provenance
) -> int:
    """Run the batches of all ranks, merge what was seen, and return how many they are."""
    tallies = [tally for shadow in shadows for tally in shadow.tallies.values()]
    observers = [observer for shadow in shadows for observer in shadow.observers]
    subjects = [observer.subject() for observer in observers]
    stored = "\n".join(str(tally.stored.calibrated) for tally in tallies)
    facts = {"another plan": origin.plan, "other ranges": stored}
    ranks.check_same("drift", lambda: facts)
    check_mergeable(subjects, has_merged=False)
    if any(subject.merging == "histogram" for subject in subjects):
        feed.hold()

    def run() -> Iterator[None]:
        return feed.runs(model, _LABEL)

    def run_again() -> Iterator[None]:
        for shadow in shadows:
            shadow.is_tallying = False
        return run()

    turns = Turns(subjects, run, run_again)
    for observer in observers:
        observer.restart()
    turns.replay()
    for at, observer in enumerate(observers):
        observer.restart(turns.calls(at))
    others = ranks.gathered("the sums of all ranges", lambda: tallies)
    for at, tally in enumerate(tallies):
        for rank, other in enumerate(others):
            if rank != ranks.rank():
                tally.merge(other[at])
    return turns.batches


def _nothing_stored() -> ExecutionError:
    return ExecutionError.of(
        "QR430",
        "this model stores no activation ranges that could drift",
        hint="dynamic kernels find ranges at run time; only static rules store them",
    )


def _no_values(batches: int) -> CalibrationError:
    return CalibrationError.of(
        "QR401",
        f"no value reached a stored range in {counted(batches, 'batch')}",
        hint="are the batches empty, or does forward not call the model?",
    )


def _warn_about(observing: Observing, converted: nn.Module) -> None:
    if not observing.missing:
        return
    names = ", ".join(f'"{name}"' for name in sorted(observing.missing))
    finding = Finding(
        "QR213",
        f"observer {names} is not available: minimum and maximum are used instead",
        hint="install the plugin, or import the module that registers it, to get its ranges",
        notes=tuple(sorted(set(observing.missing.values()))),
    )
    warn(finding, _lint(converted).ignore)


def _lint(converted: nn.Module) -> LintTable:
    """The ``[lint]`` table of the stored recipe, whose plugins may be missing here."""
    stored = compose(Source("<recipe>"), provenance(converted).recipe)
    return RecipeTable.model_validate(stored.values).lint


def _outputs_alone(kind: str) -> ExecutionError:
    return ExecutionError.of(
        "QR430",
        f"this {kind} only returns outputs: the ranges of its sites cannot be compared with data",
        hint="pass the converted model that the file was made from; compare takes a session",
    )
