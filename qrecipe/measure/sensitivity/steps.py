"""The steps of a measurement in this process, by each method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from qrecipe.audit.sample import Sample
from qrecipe.execution.batches import Forward
from qrecipe.execution.calls import Feed, calls_of
from qrecipe.execution.isolated import Isolated
from qrecipe.measure.sensitivity.estimate import Estimate
from qrecipe.measure.sensitivity.exact import Replay, rerun
from qrecipe.measure.sensitivity.log import PartLog
from qrecipe.measure.sensitivity.scores import Effect, Metric, Part, Score, new_score, number
from qrecipe.model.call import Inputs
from qrecipe.model.copies import runnable_copy, structural_copy

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


class Scorer:
    """Runs a model with one site quantized at a time, batch by batch."""

    def __init__(
        self,
        isolated: Isolated,
        model: nn.Module,
        metric: Metric | None,
        forward: Forward | None,
        limit: int,
    ) -> None:
        # the caller's own model: fusion rounds differently, which counts where errors are small
        self._eager = runnable_copy(model)
        self._forward = forward
        self._score = new_score(metric)
        self._has_value = metric is not None
        self._outputs: Callable[[Inputs, Collection[str]], Iterator[tuple[str, Any]]] = partial(
            rerun, isolated
        )
        if isolated.graph is not None:
            self._outputs = Replay(isolated.graph, isolated.kernels, limit).outputs

    def calls(self, batch: Any, index: int) -> list[Sample]:
        """The float model's calls for a batch."""
        return calls_of(self._eager, batch, index, self._forward)

    def parts(self, call: Sample, names: Collection[str]) -> Iterator[tuple[str, Part]]:
        """What a call adds to the score of each of these sites.

        The first part is that of the float model, if the caller's metric ranks.
        """
        if self._has_value:
            yield FLOAT_MODEL, self._score.part(call.output, call.output)
        for name, output in self._outputs(call.inputs, names):
            yield name, self._score.part(call.output, output)


def by_scores(
    found: Found,
    scorer: Scorer,
    names: Collection[str],
    feed: Feed,
    metric: Metric | None,
    log: PartLog,
) -> Steps:
    scores: dict[str, Score] = {name: new_score(metric) for name in (FLOAT_MODEL, *names)}
    count = feed.count
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
