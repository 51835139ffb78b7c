"""Which sets of float sites are worth trying, of hand-made errors and times."""

from __future__ import annotations

import math
import random
from itertools import chain, combinations

from tuning import in_float_time

from qrecipe.authoring.fastest.costs import Costs, SitePrice, TensorPrice
from qrecipe.authoring.tune.estimates import Estimates, SiteCost, cheapest_sets, errors_of
from qrecipe.authoring.tune.search import Measured, Search


def row_of(times, conversion):
    """Sites in a row, as (float, int8) seconds, and what converting each tensor takes."""
    names = [f"s{number}" for number in range(len(times))]
    sites = tuple(
        SitePrice(name, in_float, in_float, int8, (names[number - 1],) if number else ())
        for number, (name, (in_float, int8)) in enumerate(zip(names, times, strict=True))
    )
    tensors = (
        TensorPrice(name, tuple(names[number + 1 : number + 2]), conversion, conversion)
        for number, name in enumerate(names)
    )
    return Costs(sites, (TensorPrice(None, ("s0",), conversion, 0.0), *tensors))


def estimated(costs, errors):
    ranking = [
        SiteCost(name, "", 0.0, -10 * math.log10(error))
        for name, error in sorted(errors.items(), key=lambda item: -item[1])
    ]
    return Estimates(tuple(ranking), costs)


def errors_by_place(*errors):
    return {f"s{number}": error for number, error in enumerate(errors)}


def test_a_site_that_is_slower_in_int8_is_float_in_every_set():
    costs = row_of([(2, 1), (0.4, 8.4), (2, 1), (2, 1)], 0.1)
    estimates = estimated(costs, errors_by_place(0.3, 0.001, 0.2, 0.1))
    assert estimates.faster_float() == {"s1"}
    assert estimates.sets()[0] == {"s1"}
    assert all("s1" in names for names in estimates.sets())


def test_neighbours_that_share_their_boundaries_are_a_set_though_each_alone_is_dear():
    times = [(2, 1), (2, 1), (9, 1), (2, 1), (2, 1), (2, 1), (9, 1), (2, 1), (2, 1)]
    errors = errors_by_place(1e-4, 0.21, 1e-4, 0.2, 0.2, 0.2, 1e-4, 0.21, 1e-4)
    estimates = estimated(row_of(times, 1.0), errors)
    neighbours = {"s3", "s4", "s5"}
    alone = cheapest_sets(errors_of(estimates.ranking), estimates.prices(()))
    assert neighbours not in alone
    assert neighbours in estimates.sets()


def test_without_int8_times_and_boundaries_the_sets_are_those_of_the_knapsack():
    errors = {"a": 3.0, "b": 2.0, "c": 1.5}
    estimates = estimated(in_float_time(a=0.5, b=0.1, c=0.1), errors)
    assert estimates.sets() == [{"b"}, {"b", "c"}, {"a", "b"}]  # and all of them is no solution


def test_where_everything_is_faster_in_float_something_stays_int8():
    estimates = estimated(row_of([(1, 9), (1, 9)], 0.1), errors_by_place(0.2, 0.1))
    assert estimates.faster_float() == frozenset()
    assert {"s0", "s1"} not in estimates.sets()


class Row:
    """A bench of sites in a row, a fifth of them slow in int8; their errors add up."""

    def __init__(self, seed, *, knows_int8):
        draw = random.Random(seed)
        times = [(draw.random() ** 3, 0.0) for _ in range(8)]
        times = [(t, t * (10 if draw.random() < 0.2 else 0.4)) for t, _ in times]
        self.costs = row_of(times, 0.02)
        self.errors = errors_by_place(*(draw.random() ** 3 for _ in times))
        self.allowed = 0.3 * math.fsum(self.errors.values())
        in_float = in_float_time(**{site.name: site.contiguous for site in self.costs.sites})
        self._estimates = estimated(self.costs if knows_int8 else in_float, self.errors)

    def measure(self, candidate):
        return Measured(-self._error(candidate.floats), 0.0)

    repeat = measure

    def estimates(self, levers):
        return self._estimates

    def least_time(self):
        sizes = (combinations(self.errors, size) for size in range(len(self.errors)))
        choices = (set(names) for names in chain.from_iterable(sizes))
        return min(self.costs.predicted(c) for c in choices if self._error(c) <= self.allowed)

    def found(self):
        search = Search(self, (), -self.allowed, lambda trial: None)
        search.run()
        assert search.best.within
        return self.costs.predicted(search.best.candidate.floats), len(search.trials)

    def _error(self, floats):
        return math.fsum(error for name, error in self.errors.items() if name not in floats)


def test_with_slow_kernels_and_boundaries_the_result_is_close_to_the_fastest():
    knowing, before, trials = [], [], []
    for seed in range(20):
        row = Row(seed, knows_int8=True)
        seconds, count = row.found()
        knowing.append(seconds / row.least_time())
        before.append(Row(seed, knows_int8=False).found()[0] / row.least_time())
        trials.append(count)
    assert sum(ratio > 1.05 for ratio in knowing) <= 2
    assert sum(knowing) < sum(before) * 2 / 3
    assert sum(trials) / len(trials) < 20
