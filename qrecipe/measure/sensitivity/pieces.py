"""An exact ranking in pieces, for workers: some sites on one batch, or one evaluation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from qrecipe._torch_ao import quiet
from qrecipe.execution.batches import Forward
from qrecipe.execution.engine import engine
from qrecipe.measure.sensitivity.log import PartLog
from qrecipe.measure.sensitivity.scores import Effect, Metric, Part, new_score
from qrecipe.measure.sensitivity.steps import (
    FLOAT_MODEL,
    Evaluate,
    Found,
    Scorer,
    Steps,
    value_with,
)
from qrecipe.measure.sensitivity.subject import subject_of
from qrecipe.planning.target_cpu import TargetCpu
from qrecipe.pool.crew import crew_for
from qrecipe.pool.parcel import Compute
from qrecipe.pool.workers import Pool
from qrecipe.recipe.recipe import Recipe

Piece = tuple[int, tuple[str, ...]]
"""The index of a batch, and names of sites; an evaluation has one name, and no batch."""

_AT_ONCE = 32
"""The most sites of a piece on one batch. Each piece runs the float model twice."""


@dataclass(frozen=True, slots=True)
class RankWork:
    """A ranking for workers: each plans and calibrates for itself, and finds the same."""

    model: nn.Module
    recipe: Recipe
    evaluate: Evaluate | None
    metric: Metric | None
    forward: Forward | None
    limit: int
    target_cpu: TargetCpu

    def begun(self, batches: Sequence[Any]) -> Compute:
        subject = subject_of(self.model, self.recipe, batches, self.forward, self.target_cpu)
        isolated = subject.isolated(batches, self.forward, progress=False)
        evaluate = self.evaluate
        scorer = Scorer(isolated, self.model, self.metric, self.forward, self.limit)

        def compute(piece: Piece) -> list[tuple[str, Part]]:
            index, names = piece
            with engine(subject.plan.backend), torch.no_grad(), quiet():
                if evaluate is not None:
                    return [(name, value_with(isolated, evaluate, name)) for name in names]
                calls = scorer.calls(batches[index], index)
                return [found for call in calls for found in scorer.parts(call, names)]

        return compute


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
                    _effect(work, [own])  # or it is an error, before all others have come
                    parts[name][index] = own
                log.note(index, there)
                for _ in sites:
                    yield steps
        finally:  # also after an interrupt
            for name, by_batch in parts.items():
                found.note(name, _effect(work, [by_batch[index] for index in sorted(by_batch)]))
            counts = [len(parts[name]) for name in names]
            found.batches = min(counts)


def _pieces(work: RankWork, index: int, names: Sequence[str], log: PartLog) -> list[Piece]:
    """What is left to do on a batch."""
    left = log.left(index, names)
    at_once = _AT_ONCE if work.evaluate is None else 1
    return [(index, left[start : start + at_once]) for start in range(0, len(left), at_once)]


def _effect(work: RankWork, parts: Iterable[Iterable[Part]]) -> Effect:
    """The effect of all parts of a site, in the order of batches and calls."""
    score = new_score(work.metric if work.evaluate is None else lambda output, reference: 0.0)
    for part in (part for some in parts for part in some):
        score.add(part)
    return score.effect()
