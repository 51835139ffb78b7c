"""The search: which candidates are tried, in which order, and which of them is the best.

Nothing here runs a model. No step takes for granted that more float means more accuracy: whatever
is chosen has been measured as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from qrecipe.authoring.tune_candidate import Candidate, Lever
from qrecipe.rules import listed

_MOST_ALONE = 8
"""How many of the most sensitive sites are tried as the only float one."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a candidate gave: its finite accuracy, or the error that stood in the way of one."""

    metric: float | None
    seconds: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate: what was tried, what it gave, and whether the search went on from it.

    ``metric`` is None where there is no finite one, and ``error`` says why; ``within`` tells
    whether it is within the budget; ``seconds`` are those of making and evaluating it.
    """

    what: str
    candidate: Candidate
    metric: float | None
    within: bool
    kept: bool
    seconds: float
    error: str | None

    @property
    def score(self) -> float:
        """The metric as a number to compare: none is worse than any."""
        return -math.inf if self.metric is None else self.metric


@dataclass(frozen=True, slots=True)
class SiteCost:
    """A site that could stay float: why, and its share of the float model's time, 0 to 1.

    ``sqnr_db`` is that of the output with this site alone quantized; None where it is not finite,
    or where the output holds no floating tensor and the accuracy ranked the sites.
    """

    name: str
    reason: str
    share: float
    sqnr_db: float | None


class Bench(Protocol):
    """What the search asks of the world; both may end the search by an exception."""

    def measure(self, candidate: Candidate) -> Measured: ...

    def costs(self, levers: tuple[Lever, ...]) -> Sequence[SiteCost]:
        """The sites that could stay float, the most sensitive first."""


class Search:
    """Trials in order, from the whole recipe to as few float sites as the budget needs."""

    def __init__(
        self,
        bench: Bench,
        levers: Sequence[Lever],
        target: float,
        record: Callable[[Trial], None],
    ) -> None:
        self.trials: list[Trial] = []
        self.costs: tuple[SiteCost, ...] = ()
        self._bench = bench
        self._levers = levers
        self._target = target
        self._record = record
        self._tried: dict[Candidate, Trial] = {}

    def run(self) -> None:
        """Try until the budget is met with as few sites float as can be found."""
        current = self._try(Candidate(), "the recipe as it is", lambda trial: True)
        for lever in self._levers:
            if current.within:
                return
            candidate = Candidate((*current.candidate.levers, lever))
            better = _better_than(current)
            trial = self._try(candidate, lever.what, better)
            current = trial if trial.kept else current
        if not current.within:
            self._leave_float(current.candidate.levers)

    @property
    def best(self) -> Trial:
        """Within the budget what leaves least float, by its share of the time; else the best."""
        within = [trial for trial in self.trials if trial.within]
        if within:
            return min(within, key=lambda trial: (*self.weight(trial), -trial.score))
        return min(self.trials, key=lambda trial: (-trial.score, *self.weight(trial)))

    def weight(self, trial: Trial) -> tuple[float, int]:
        """The share of the float time that a candidate leaves float, and the number of sites."""
        floats = trial.candidate.floats
        return sum(cost.share for cost in self.costs if cost.name in floats), len(floats)

    def _leave_float(self, levers: tuple[Lever, ...]) -> None:
        self.costs = tuple(self._bench.costs(levers))
        ranked = [cost.name for cost in self.costs]
        # all of them float is the float model: within the budget, and no solution
        enough = self._prefix(levers, ranked) or ranked
        share = {cost.name: cost.share for cost in self.costs}
        left: Sequence[str] = sorted(enough, key=lambda name: -share[name])
        while (fewer := self._returned(levers, left, left)) != left:
            left = fewer
        self._one_alone(levers, left, ranked)

    def _prefix(self, levers: tuple[Lever, ...], ranked: Sequence[str]) -> Sequence[str] | None:
        """The shortest row of the most sensitive sites that is found to be enough, if any is."""
        low = 0
        for high in _sizes(len(ranked)):
            if self._float(levers, ranked[:high], _most_sensitive(ranked[:high])):
                break
            low = high
        else:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self._float(levers, ranked[:middle], _most_sensitive(ranked[:middle])):
                high = middle
            else:
                low = middle
        return ranked[:high]

    def _returned(
        self, levers: tuple[Lever, ...], left: Sequence[str], chunk: Sequence[str]
    ) -> Sequence[str]:
        """What is still float once as much of a chunk as can be is int8 again."""
        rest = [name for name in left if name not in chunk]
        if self._float(levers, rest, f"{listed(chunk)} back in int8"):
            return rest
        if len(chunk) < 2:
            return left
        middle = len(chunk) // 2
        left = self._returned(levers, left, chunk[:middle])
        return self._returned(levers, left, chunk[middle:])

    def _one_alone(
        self, levers: tuple[Lever, ...], left: Sequence[str], ranked: Sequence[str]
    ) -> None:
        """Whether one site that takes less time is all that need be float: the cheapest first.

        Errors that cancel can hide that one site is the whole trouble.
        """
        share = {cost.name: cost.share for cost in self.costs}
        spent = sum(share[name] for name in left)
        for name in sorted(ranked[:_MOST_ALONE], key=share.__getitem__):
            is_cheaper = share[name] < spent or (len(left) > 1 and share[name] <= spent)
            if is_cheaper and self._float(levers, [name], f"only {name} float"):
                return

    def _float(self, levers: tuple[Lever, ...], names: Sequence[str], what: str) -> bool:
        candidate = Candidate(levers, frozenset(names))
        return self._try(candidate, what, lambda trial: trial.within).within

    def _try(self, candidate: Candidate, what: str, keeps: Callable[[Trial], bool]) -> Trial:
        if candidate in self._tried:
            return self._tried[candidate]
        measured = self._bench.measure(candidate)
        metric = measured.metric
        within = metric is not None and metric >= self._target
        trial = Trial(what, candidate, metric, within, False, measured.seconds, measured.error)
        trial = replace(trial, kept=keeps(trial))
        self._tried[candidate] = trial
        self.trials.append(trial)
        self._record(trial)
        return trial


def _better_than(current: Trial) -> Callable[[Trial], bool]:
    return lambda trial: trial.score > current.score


def _sizes(count: int) -> Sequence[int]:
    """1, 2, 4, ... and all but one."""
    doubled = [2**power for power in range(count.bit_length()) if 2**power < count - 1]
    return [*doubled, count - 1] if count > 1 else []


def _most_sensitive(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"the most sensitive site float: {names[0]}"
    return f"the {len(names)} most sensitive sites float, up to {names[-1]}"
