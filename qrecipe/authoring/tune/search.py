"""The search: which candidates are tried, in which order, and which one is the best.

Nothing here runs a model. No step assumes that more float means more accuracy: whatever is chosen
has been measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from qrecipe.authoring.tune.estimates import Block, Estimates, cheapest_sets, errors_of
from qrecipe.authoring.tune.levers import Candidate, Lever
from qrecipe.errors.short import ShortRepr
from qrecipe.rules.resolution import listed

_MOST_ALONE = 8
"""How many of the most sensitive sites are tried as the only float site."""

_MOST_BLOCKS = 8
"""How many blocks are tried as the only float one."""

_NO_TIME = 1e-9
"""The fewest seconds to divide by."""

_MOST_REFINING = 32
"""How many trials may return sites to int8 or exchange them."""

_SHORT_ROW = 8
"""The largest number of most sensitive sites up to which every number is tried."""

_LEAST_GAIN = 0.05
"""The share of the missing accuracy that a lever has to gain."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The result for a candidate: its finite accuracy, or why there is none.

    ``latency`` and ``is_slower`` are as in `Trial`.
    """

    metric: float | None
    seconds: float
    error: str | None = None
    latency: float | None = None
    is_slower: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class Trial(ShortRepr):
    """One candidate: what was tried, what it gave, and whether the search went on from it.

    ``metric`` is None if there is no finite one, and ``error`` says why; ``within`` tells whether
    it is within the budget; ``seconds`` is the time to quantize and evaluate it. ``is_repeated``
    marks the second measurement of a chosen candidate. ``latency`` is the time of the first call
    as a multiple of the float model's, measured in turns with it; None if it was not measured:
    there is no metric, or the model was made for another CPU. ``is_slower`` tells whether it was
    slower than the float model, beyond noise.
    """

    what: str
    candidate: Candidate
    metric: float | None
    within: bool
    kept: bool
    seconds: float
    error: str | None
    is_repeated: bool = False
    latency: float | None = None
    is_slower: bool = False

    @property
    def score(self) -> float:
        """The metric for comparisons: none is the worst."""
        return -math.inf if self.metric is None else self.metric


class Bench(Protocol):
    """What the search needs to measure; all may end the search with an exception."""

    def measure(self, candidate: Candidate) -> Measured: ...

    def repeat(self, candidate: Candidate) -> Measured:
        """Quantize and evaluate the candidate again."""

    def estimates(self, levers: tuple[Lever, ...]) -> Estimates:
        """The errors and times of the sites that could stay float."""


class Search:
    """Trials in order, from the unchanged recipe to the fastest one within the budget."""

    def __init__(
        self,
        bench: Bench,
        levers: Sequence[Lever],
        target: float,
        record: Callable[[Trial], None],
    ) -> None:
        self.trials: list[Trial] = []
        self.estimates = Estimates()
        self._bench = bench
        self._levers = levers
        self.target = target
        self._record = record
        self._tried: dict[Candidate, Trial] = {}
        self._seconds: dict[frozenset[str], float] = {}
        self._faster_float: frozenset[str] = frozenset()
        self._prices: Mapping[str, float] = {}
        self._refinements = _MOST_REFINING

    def run(self) -> None:
        """Search until the budget is met in as little time as can be found."""
        current = self._try(Candidate(), "the unchanged recipe", lambda trial: True)
        for lever in self._levers:
            if current.within:
                break
            candidate = current.candidate.with_lever(lever)
            trial = self._try(candidate, lever.what, _gains_over(current, self.target))
            current = trial if trial.kept else current
        if not current.within:
            self._leave_float(current.candidate.levers)
        self._take_levers_back()
        self._repeat()

    @property
    def best(self) -> Trial:
        """The trial within the budget with the least predicted time; else the most accurate."""
        tried = self._tried.values()
        within = [trial for trial in tried if trial.within]
        if within:
            return min(within, key=lambda trial: (*self.weight(trial), -trial.score))
        return min(tried, key=lambda trial: (-trial.score, *self.weight(trial)))

    def weight(self, trial: Trial) -> tuple[float, int, int]:
        """The predicted seconds, and the numbers of float sites and levers."""
        return (*self._cost(trial.candidate.floats), len(trial.candidate.levers))

    def _cost(self, floats: frozenset[str]) -> tuple[float, int]:
        if floats not in self._seconds:
            self._seconds[floats] = self.estimates.costs.predicted(floats)
        return self._seconds[floats], len(floats)

    def _leave_float(self, levers: tuple[Lever, ...]) -> None:
        self.estimates = self._bench.estimates(levers)
        self._seconds.clear()
        self._faster_float = self.estimates.faster_float()
        self._prices = self.estimates.prices(self._faster_float)
        ranked = self.estimates.ranked
        self._returned_until_none(levers, self._cheapest(levers) or self._row(levers, ranked) or ())
        self._returned_until_none(levers, self._blocks(levers))
        self._one_alone(levers, ranked)
        if not self.best.within:
            # all sites float would be the float model: within the budget, but not a solution
            self._returned_until_none(levers, ranked)
        while self.best.within and self._exchanged(levers):
            self._returned_until_none(levers, self.best.candidate.floats)

    def _cheapest(self, levers: tuple[Lever, ...]) -> Collection[str] | None:
        """The fastest set of the estimates that turns out to be enough."""
        sets = self.estimates.sets()

        def is_enough(place: int) -> bool:
            what = f"float at the lowest cost: {listed(self._in_order(sets[place]))}"
            return self._float(levers, sets[place], what)

        place = _first(-1, len(sets), is_enough)
        return sets[place] if place < len(sets) else None

    def _row(self, levers: tuple[Lever, ...], ranked: Sequence[str]) -> Sequence[str] | None:
        """A short row of most sensitive sites that turns out to be enough, if any."""
        low = 0
        for high in _sizes(len(ranked)):
            if self._prefix(levers, ranked, high):
                break
            low = high
        else:
            # more float can be worse: a row between two that fail may do
            row = range(1, min(_SHORT_ROW, len(ranked) - 1) + 1)
            enough = (size for size in row if self._prefix(levers, ranked, size))
            size = next(enough, None)
            return None if size is None else ranked[:size]
        return ranked[: _first(low, high, partial(self._prefix, levers, ranked))]

    def _prefix(self, levers: tuple[Lever, ...], ranked: Sequence[str], size: int) -> bool:
        return self._float(levers, ranked[:size], _most_sensitive(ranked[:size]))

    def _returned_until_none(self, levers: tuple[Lever, ...], names: Collection[str]) -> None:
        """Return halves of the float sites to int8, then halves of these, until none can be."""
        left: Sequence[str] = sorted(self._in_order(names), key=self._negative_price)
        while (fewer := self._returned(levers, left, left)) != left:
            left = fewer

    def _returned(
        self, levers: tuple[Lever, ...], left: Sequence[str], chunk: Sequence[str]
    ) -> Sequence[str]:
        """The sites still float after returning as much of a chunk to int8 as possible."""
        rest = [name for name in left if name not in chunk]
        is_faster = self._cost(frozenset(rest)) < self._cost(frozenset(left))
        if is_faster and self._refined(levers, rest, f"{listed(chunk)} back in int8"):
            return rest
        if len(chunk) < 2:
            return left
        middle = len(chunk) // 2
        left = self._returned(levers, left, chunk[:middle])
        return self._returned(levers, left, chunk[middle:])

    def _one_alone(self, levers: tuple[Lever, ...], ranked: Sequence[str]) -> None:
        """Whether a single float site is enough and faster, the cheapest first.

        What is faster in float stays float too. Errors that cancel can hide that one site causes
        the whole loss.
        """
        for name in sorted(ranked[:_MOST_ALONE], key=self._prices.__getitem__):
            names = self._faster_float | {name}
            if self._is_worth_it(names) and self._float(levers, names, _only(name)):
                return

    def _blocks(self, levers: tuple[Lever, ...]) -> Collection[str]:
        """The blocks that turn out to be enough and faster: one, or those that gain most together.

        Sites that are quantized one at a time do not show what they do to each other. A block that
        alone is float does.
        """
        before, gains = self._tried[Candidate(levers)].score, dict[Block, float]()
        for block in sorted(self.estimates.blocks()[:_MOST_BLOCKS], key=lambda b: b.seconds):
            floats = self._faster_float | block.sites
            if self._is_worth_it(floats):
                if self._float(levers, floats, _only(f"the block {block.path}")):
                    return floats
                gain = self._tried[Candidate(levers, floats)].score - before
                gains[block] = gain / max(block.seconds, _NO_TIME)
        useful = sorted((b for b in gains if gains[b] > 0), key=gains.__getitem__, reverse=True)
        for count in range(2, len(useful) + 1):
            floats = self._faster_float.union(*(block.sites for block in useful[:count]))
            what = f"the blocks {listed([block.path for block in useful[:count]])} float"
            if self._is_worth_it(floats) and self._float(levers, floats, what):
                return floats
        return ()

    def _is_worth_it(self, floats: frozenset[str]) -> bool:
        """Whether something stays int8, and no set within the budget is as fast so far."""
        best = self.best
        most = self._cost(best.candidate.floats) if best.within else (math.inf, 0)
        return not self.estimates.is_all_float(floats) and self._cost(floats) < most

    def _exchanged(self, levers: tuple[Lever, ...]) -> bool:
        """Whether cheaper sites could replace a float site, the costliest first."""
        left = self.best.candidate.floats
        errors = {n: e for n, e in errors_of(self.estimates.ranking).items() if n not in left}
        priced = [
            (sum(map(self._price, names)), names) for names in cheapest_sets(errors, self._prices)
        ]
        for name in sorted(self._in_order(left), key=self._negative_price):
            cheaper = [names for price, names in priced if price < self._price(name)]
            floats = (left - {name}).union(*cheaper[-1:])
            if cheaper and self._cost(floats) < self._cost(left):
                what = f"{listed(self._in_order(cheaper[-1]))} float instead of {name}"
                if self._refined(levers, floats, what):
                    return True
        return False

    def _take_levers_back(self) -> None:
        """Try without each lever in turn: one that is not needed only restricts the recipe."""
        for lever in reversed(self._levers):
            best = self.best
            levers = best.candidate.levers
            if best.within and lever in levers:
                without = tuple(each for each in levers if each != lever)
                what = f"without this lever: {lever.what}"
                self._float(without, best.candidate.floats, what)

    def _repeat(self) -> None:
        """Repeat a chosen trial: the best of many noisy values is too good."""
        best = self.best
        if len(self.trials) > 1 and best.within:
            measured = self._bench.repeat(best.candidate)
            trial = self._judged(best.candidate, "the best again", measured)
            self._note(replace(trial, kept=trial.within, is_repeated=True))

    def _in_order(self, names: Collection[str]) -> Sequence[str]:
        """The most sensitive first, and those without an error of their own at the end."""
        ranked = self.estimates.ranked
        rest = sorted(set(names).difference(ranked))
        return [*(name for name in ranked if name in names), *rest]

    def _price(self, name: str) -> float:
        return self._prices.get(name, 0.0)

    def _negative_price(self, name: str) -> float:
        return -self._price(name)

    def _refined(self, levers: tuple[Lever, ...], names: Collection[str], what: str) -> bool:
        """As `_float`, but False without a trial after enough of this kind."""
        if Candidate(levers, frozenset(names)) not in self._tried:
            if not self._refinements:
                return False
            self._refinements -= 1
        return self._float(levers, names, what)

    def _float(self, levers: tuple[Lever, ...], names: Collection[str], what: str) -> bool:
        candidate = Candidate(levers, frozenset(names))
        return self._try(candidate, what, lambda trial: trial.within).within

    def _try(self, candidate: Candidate, what: str, keeps: Callable[[Trial], bool]) -> Trial:
        if candidate in self._tried:
            return self._tried[candidate]
        trial = self._judged(candidate, what, self._bench.measure(candidate))
        trial = replace(trial, kept=keeps(trial))
        self._tried[candidate] = trial
        self._note(trial)
        return trial

    def _note(self, trial: Trial) -> None:
        self.trials.append(trial)
        self._record(trial)

    def _judged(self, candidate: Candidate, what: str, measured: Measured) -> Trial:
        metric = measured.metric
        within = metric is not None and metric >= self.target
        trial = Trial(what, candidate, metric, within, False, measured.seconds, measured.error)
        return replace(trial, latency=measured.latency, is_slower=measured.is_slower)


def _gains_over(current: Trial, target: float) -> Callable[[Trial], bool]:
    """Whether a trial is within the budget or gains enough of what is missing."""
    least = 0.0 if current.metric is None else _LEAST_GAIN * (target - current.metric)
    return lambda trial: trial.within or trial.score > current.score + least


def _first(low: int, high: int, is_enough: Callable[[int], bool]) -> int:
    """The first place above ``low`` that is enough, found by bisection; ``high`` if none is."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _sizes(count: int) -> Sequence[int]:
    """1, 2, 4, ... and all but one."""
    doubled = [2**power for power in range(count.bit_length()) if 2**power < count - 1]
    return [*doubled, count - 1] if count > 1 else []


def _most_sensitive(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"the most sensitive site float: {names[0]}"
    return f"the {len(names)} most sensitive sites float, up to {names[-1]}"


def _only(name: str) -> str:
    return f"only {name} float"
