"""What is ranked, and the steps of measuring it by each method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

from qrecipe._torch_ao import quiet
from qrecipe.audit.sample import Sample
from qrecipe.errors.findings import ExecutionError
from qrecipe.execution.batches import Forward, inputs_of_batch, peek
from qrecipe.execution.calibration import calibrate
from qrecipe.execution.calls import Feed, calls_of
from qrecipe.execution.engine import engine
from qrecipe.execution.executors import executor_of
from qrecipe.execution.failing_observers import failing_observers_named
from qrecipe.execution.isolated import Isolated
from qrecipe.execution.part import Task
from qrecipe.measure.sensitivity.estimate import Estimate
from qrecipe.measure.sensitivity.exact import Replay, rerun
from qrecipe.measure.sensitivity.scores import (
    Effect,
    Metric,
    Part,
    PartLog,
    Score,
    number,
    part_of,
)
from qrecipe.model.call import Inputs
from qrecipe.model.copies import runnable_copy, structural_copy
from qrecipe.model.graph_sites import Inventory
from qrecipe.planning.decide import plan_of
from qrecipe.planning.inventory import inventory_of
from qrecipe.planning.plan import Plan, Site
from qrecipe.planning.target_cpu import TargetCpu, unjudged_sites
from qrecipe.pool.crew import crew_for
from qrecipe.pool.parcel import Compute
from qrecipe.pool.workers import Pool
from qrecipe.recipe.recipe import Recipe
from qrecipe.terminal.progress import Progress

Evaluate = Callable[[nn.Module], float]
"""The quality of a model; higher is better."""

FLOAT_MODEL = ""
"""In place of a site's name: the float model itself."""


@dataclass(slots=True)
class Found:
    """What is measured so far: SQNR, value and number of batches by site, and whole batches."""

    effects: dict[str, Effect] = field(default_factory=dict)
    batches: int = 0
    float_value: float | None = None

    def note(self, name: str, effect: Effect) -> None:
        """Keep the effect of a site, or the value of the float model."""
        if name == FLOAT_MODEL:
            self.float_value = effect[1]
        else:
            self.effects[name] = effect


Steps = Generator[int | None, None, None]
"""Measures, and after each step gives the number of all steps if it is known."""


Piece = tuple[int, tuple[str, ...]]
"""The index of a batch, and names of sites; an evaluation has one name, and no batch."""


@dataclass(frozen=True, slots=True)
class RankWork:
    """What is ranked, and by which measure: SQNR, or one of the caller's.

    ``limit`` is the number of bytes of float activations that may be kept. Each worker plans and
    calibrates for itself, and finds the same.
    """

    model: nn.Module
    recipe: Recipe
    evaluate: Evaluate | None
    metric: Metric | None
    forward: Forward | None
    limit: int
    target_cpu: TargetCpu

    def begun(self, batches: Sequence[Any]) -> Compute:
        subject, evaluate = subject_of(self, batches), self.evaluate
        isolated = subject.isolated(batches, progress=False)
        scorer = Scorer(self, isolated)

        def compute(piece: Piece) -> list[tuple[str, Part]]:
            index, names = piece
            with engine(subject.plan.backend), torch.no_grad(), quiet():
                if evaluate is not None:
                    return [(name, value_with(isolated, evaluate, name)) for name in names]
                calls = scorer.calls(batches[index], index)
                return [found for call in calls for found in scorer.parts(call, names)]

        return compute


class Scorer:
    """Runs a model with one site quantized at a time, batch by batch."""

    def __init__(self, work: RankWork, isolated: Isolated) -> None:
        # the caller's own model: fusion rounds differently, which counts where errors are small
        self._eager = runnable_copy(work.model)
        self._forward = work.forward
        self._metric = work.metric
        self._outputs: Callable[[Inputs, Collection[str]], Iterator[tuple[str, Any]]] = partial(
            rerun, isolated
        )
        if isolated.graph is not None:
            self._outputs = Replay(isolated.graph, isolated.kernels, work.limit).outputs

    def calls(self, batch: Any, index: int) -> list[Sample]:
        """The float model's calls for a batch."""
        return calls_of(self._eager, batch, index, self._forward)

    def parts(self, call: Sample, names: Collection[str]) -> Iterator[tuple[str, Part]]:
        """What a call adds to the score of each of these sites.

        The first part is that of the float model, if the caller's metric ranks.
        """
        if self._metric is not None:
            yield FLOAT_MODEL, part_of(self._metric, call.output, call.output)
        for name, output in self._outputs(call.inputs, names):
            yield name, part_of(self._metric, call.output, output)


def by_scores(
    found: Found,
    work: RankWork,
    isolated: Isolated,
    names: Collection[str],
    feed: Feed,
    log: PartLog,
) -> Steps:
    scorer, count = Scorer(work, isolated), feed.count
    scores = defaultdict[str, Score](Score)
    for index, batch in enumerate(feed):
        for name, part in _parts(scorer, names, batch, index, log):
            scores[name].add(part)
            found.note(name, scores[name].effect())
            if name != FLOAT_MODEL:
                yield None if count is None else count * len(names)
        found.batches += 1


def _parts(
    scorer: Scorer, names: Collection[str], batch: Any, index: int, log: PartLog
) -> Iterator[tuple[str, Part]]:
    """The parts of all sites on a batch, first those that are not in the log."""
    left = log.left(index, names)
    calls = scorer.calls(batch, index) if left else []
    new: dict[str, list[Part]] = defaultdict(list)
    for call in calls:
        for name, part in scorer.parts(call, left):
            new[name].append(part)
            if call is calls[-1]:
                log.note(index, {name: new[name]})
            yield name, part
    for name in (FLOAT_MODEL, *names):
        if name not in new:
            yield from ((name, part) for part in log.parts(index, name))


def value_with(isolated: Isolated, evaluate: Evaluate, name: str) -> float:
    """The caller's measure of the model with one site quantized, or of the float model."""

    def value() -> float:
        return number(partial(evaluate, structural_copy(isolated.float_model)), "evaluate")

    lone = next((lone for lone in isolated.sites if lone.site.name == name), None)
    if lone is None:
        return value()
    with lone.replaced(isolated.kernels[name]):
        return value()


def by_estimate(found: Found, feed: Feed, estimate: Estimate) -> Steps:
    with estimate.probing() as probed:
        for index, batch in enumerate(feed):
            for call in calls_of(probed, batch, index, feed.forward):
                estimate.add(call.inputs)
            found.batches += 1
            for name, sqnr_db in estimate.sqnr_db().items():
                found.effects[name] = (sqnr_db, None, found.batches)
            yield feed.count


def by_evaluation(found: Found, isolated: Isolated, evaluate: Evaluate, log: PartLog) -> Steps:
    names = [FLOAT_MODEL, *(lone.site.name for lone in isolated.sites)]
    found.batches = 1
    for name in names:
        value = log.value(name, partial(value_with, isolated, evaluate, name))
        found.note(name, (None, value, 1))
        yield len(names)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model and its plan; ``reasons`` say why each site that is not in ``sites`` is left out."""

    plan: Plan
    sites: Sequence[Site]
    reasons: Mapping[str, str]
    _task: Task
    _forward: Forward | None

    def isolated(self, batches: Iterable[Any], progress: Progress | bool | None) -> Isolated:
        """The model with its sites in place, calibrated on the batches."""
        run = partial(calibrate, batches=batches, forward=self._forward, progress=progress)
        with failing_observers_named():
            return executor_of(self.plan.executor).isolated(self._task, self.sites, run)


def subject_of(work: RankWork, batches: Iterable[Any]) -> Subject:
    """Plan the recipe for the first batch. Raises ``ExecutionError`` (QR422) without any site."""
    first, _ = peek(batches)
    with inputs_of_batch(work.model, first, work.forward) as inputs:
        inventory = inventory_of(work.model, work.recipe, inputs)
    plan = plan_of(inventory, work.recipe, inputs)
    reasons = unranked(inventory, plan)
    sites = [site for site in plan.sites if site.name not in reasons]
    if not sites:
        raise ExecutionError.of(
            "QR422",
            f"the plan quantizes none of {len(reasons)} sites with a range of its own",
            hint="`qrecipe plan` shows why each stays float",
        )
    unjudged = unjudged_sites(plan, work.target_cpu)
    task = Task(inventory.model, work.recipe, inventory, plan, inputs, unjudged)
    return Subject(plan, sites, reasons, task, work.forward)


def unranked(inventory: Inventory, plan: Plan) -> dict[str, str]:
    """The sites that cannot be quantized alone, and why."""
    found: dict[str, str] = {}
    for site in plan.sites:
        if site.verdict == "float":
            found[site.name] = "stays float"
        elif site.verdict == "passthrough":
            found[site.name] = f"{site.reason}: alone it would stay float"
        elif inventory.matches[site.name].operation.kind == "fixed_qparams":
            found[site.name] = "its range is fixed and its producer float: alone it stays float"
    return found


_AT_ONCE = 32
"""The most sites of a piece on one batch. Each piece runs the float model twice."""


def on_workers(
    found: Found,
    work: RankWork,
    names: Sequence[str],
    batches: Iterable[Any],
    pool: Executor | Pool,
    log: PartLog,
) -> Steps:
    """The steps of a ranking whose pieces come back in any order."""
    parts: dict[str, dict[int, Sequence[Part]]] = defaultdict(dict)
    ranked = names if work.evaluate is None else (FLOAT_MODEL, *names)
    with crew_for(work, batches, pool) as crew:
        places = range(crew.batches if work.evaluate is None else 1)
        pieces = [piece for index in places for piece in _pieces(work, index, ranked, log)]
        steps = len(places) * len(ranked)
        try:
            for index, name in product(places, (FLOAT_MODEL, *names)):
                if known := log.parts(index, name):
                    parts[name][index] = known
                    if name in ranked:
                        yield steps
            for (index, sites), value in crew.results(pieces):
                there: dict[str, list[Part]] = defaultdict(list)
                for name, part in value:
                    there[name].append(part)
                for name, own in there.items():
                    _effect([own])  # or it is an error, before all others have come
                    parts[name][index] = own
                log.note(index, there)
                for _ in sites:
                    yield steps
        finally:  # also after an interrupt
            for name, by_batch in parts.items():
                found.note(name, _effect(by_batch[index] for index in sorted(by_batch)))
            counts = [len(parts[name]) for name in names]
            found.batches = min(counts)


def _pieces(work: RankWork, index: int, names: Sequence[str], log: PartLog) -> list[Piece]:
    """What is left to do on a batch."""
    left = log.left(index, names)
    at_once = _AT_ONCE if work.evaluate is None else 1
    return [(index, left[start : start + at_once]) for start in range(0, len(left), at_once)]


def _effect(parts: Iterable[Iterable[Part]]) -> Effect:
    """The effect of all parts of a site, in the order of batches and calls."""
    score = Score()
    for part in (part for some in parts for part in some):
        score.add(part)
    return score.effect()
