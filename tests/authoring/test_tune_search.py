"""The order of the search, on tables of accuracies."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import combinations

import pytest
from tuning import in_float_time

from qrecipe.authoring.tune.estimates import (
    Estimates,
    SiteCost,
    blocks_of,
    cheapest_sets,
    errors_of,
)
from qrecipe.authoring.tune.levers import Candidate, Lever
from qrecipe.authoring.tune.result import front_of
from qrecipe.authoring.tune.search import Measured, Search, Trial


def estimates(ranking):
    """Sites that take no time in int8, and nothing to convert their tensors."""
    shares = {cost.name: cost.share for cost in ranking}
    return Estimates(tuple(ranking), in_float_time(**shares))


class Table:
    """A bench that looks accuracies up, for nets that one would have to search for."""

    def __init__(self, metric, shares):
        self.metric = metric
        self.shares = shares
        self.tried = []

    def measure(self, candidate):
        self.tried.append(candidate.floats)
        return Measured(self.metric(candidate.floats), 0.0)

    def repeat(self, candidate):
        return Measured(self.metric(candidate.floats), 0.0)

    def estimates(self, levers):
        return estimates([SiteCost(name, "", share, None) for name, share in self.shares.items()])


def searched(metric, shares, target):
    bench, seen = Table(metric, shares), []
    search = Search(bench, (), target, seen.append)
    search.run()
    assert seen == search.trials
    assert len(set(bench.tried)) == len(bench.tried), "nothing is measured twice"
    assert set(shares) not in bench.tried, "all float is no candidate"
    return search


def test_the_last_sites_of_a_row_are_all_that_is_left_float_where_they_alone_matter():
    names = "abcdefghij"
    search = searched(lambda floats: float({"c", "d"} <= floats), dict.fromkeys(names, 0.1), 1.0)
    assert search.best.candidate.floats == {"c", "d"}
    assert len(search.trials) < 16


def test_of_two_ways_within_the_budget_the_one_that_costs_less_time_is_taken():
    shares = {"slow": 0.8, "quick": 0.1, "other": 0.1}
    metric = lambda floats: float(bool(floats & {"slow", "quick"}))  # noqa: E731
    assert searched(metric, shares, 1.0).best.candidate.floats == {"quick"}


def test_trouble_that_hides_at_the_end_of_the_ranking_is_found():
    names = dict.fromkeys("abcdefgh", 0.125)
    search = searched(lambda floats: float("h" in floats), names, 1.0)
    assert search.best.candidate.floats == {"h"}


def test_where_nothing_is_enough_the_search_ends_with_the_best():
    names = dict.fromkeys("abcd", 0.25)
    search = searched(lambda floats: 0.5 if floats == {"a", "b"} else 0.0, names, 1.0)
    assert not any(trial.within for trial in search.trials)
    assert search.best.candidate.floats == {"a", "b"}


def test_where_only_a_short_row_is_enough_between_two_that_fail_it_is_found():
    names = dict.fromkeys("abcdefghij", 0.1)
    search = searched(lambda floats: float(floats == set("abc")), names, 1.0)
    assert search.best.candidate.floats == set("abc")


def of_two_blocks(needed, blocks=8, sites=6):
    """Sites of which only two whole blocks gain anything, in an order that says nothing."""
    names = [f"features.{block}.{site}" for site in range(sites) for block in range(blocks)]
    random.Random(0).shuffle(names)
    whole = [{name for name in names if name.startswith(f"features.{n}.")} for n in needed]
    return names, lambda floats: sum(block <= floats for block in whole) / len(whole)


def test_blocks_that_are_only_enough_together_are_found_by_what_each_gains():
    names, metric = of_two_blocks((2, 5))
    search = searched(metric, dict.fromkeys(names, 1 / len(names)), 1.0)
    assert search.best.candidate.floats == {n for n in names if n.split(".")[1] in "25"}
    what = [trial.what for trial in search.trials if trial.within]
    assert "the blocks features.5, features.2 float" in what


def test_without_blocks_a_search_among_many_sites_leaves_too_much_float(monkeypatch):
    monkeypatch.setattr(Estimates, "blocks", lambda estimates: [])
    names, metric = of_two_blocks((2, 5))
    search = searched(metric, dict.fromkeys(names, 1 / len(names)), 1.0)
    assert len(search.best.candidate.floats) > 2 * 6


def test_a_block_costs_what_its_sites_cost_together():
    shares = {"a.0": 0.5, "a.1": 0.3, "b.0": 0.1, "b.1": 0.1}
    found = estimates([SiteCost(name, "", share, 10.0) for name, share in shares.items()])
    assert [(block.path, block.seconds) for block in found.blocks()] == [
        ("b", pytest.approx(0.2)),  # equal errors: the one that costs less first
        ("a", pytest.approx(0.8)),
    ]


@pytest.mark.parametrize(
    ("names", "blocks"),
    [
        ("f.1.conv.0 f.1.conv.1 f.1:add f.2.conv.0 f.2.conv.1 head", ["f.1", "f.2"]),
        ("f.0 f.1 f.2 head", ["f"]),  # nothing in it is a block
        ("l.0.att.q l.0.att.k l.0.mlp.0 l.0.mlp.1 l.0:add", ["l.0.att", "l.0.mlp"]),
        ("conv conv#1 :add head", ["conv"]),  # one layer that is called twice
        ("a b :add", []),
        ("", []),
    ],
)
def test_blocks_are_the_largest_modules_that_hold_no_two_others(names, blocks):
    assert list(blocks_of(names.split())) == blocks


class Landscape:
    """Losses that add up: a bench that knows the true ones, and tells estimates of them."""

    def __init__(self, seed, sites, distortion):
        draw = random.Random(seed)
        names = [f"s{index}" for index in range(sites)]
        times = {name: draw.random() ** 3 for name in names}
        whole = sum(times.values())
        self.share = {name: time / whole for name, time in times.items()}
        self.loss = {name: draw.random() ** 3 for name in names}
        self.allowed = 0.3 * sum(self.loss.values())
        seen = {
            name: loss * math.exp(draw.gauss(0, distortion)) for name, loss in self.loss.items()
        }
        self._costs = [
            SiteCost(name, "", self.share[name], -10 * math.log10(seen[name]))
            for name in sorted(names, key=seen.__getitem__, reverse=True)
        ]

    def measure(self, candidate):
        left = [loss for name, loss in self.loss.items() if name not in candidate.floats]
        return Measured(-math.fsum(left), 0.0)

    repeat = measure

    def estimates(self, levers):
        return estimates(self._costs)

    def least_time(self):
        return min(
            sum(self.share[name] for name in floats)
            for size in range(len(self.loss))
            for floats in combinations(self.loss, size)
            if math.fsum(loss for n, loss in self.loss.items() if n not in floats) <= self.allowed
        )


@pytest.mark.parametrize(("distortion", "most_worse"), [(0.0, 0), (0.5, 1), (1.0, 3)])
def test_where_losses_add_up_the_float_time_is_close_to_the_least(distortion, most_worse):
    worse, trials = [], []
    for seed in range(50):
        bench = Landscape(seed, 8, distortion)
        search = Search(bench, (), -bench.allowed, lambda trial: None)
        search.run()
        assert search.best.within
        worse.append(search.weight(search.best)[0] - bench.least_time())
        trials.append(len(search.trials))
    assert sum(gap > 0.05 for gap in worse) <= most_worse
    assert max(worse) < 0.2
    assert sum(trials) / 50 < 20


@pytest.mark.parametrize("sites", [1, 2, 10, 50, 300])
def test_a_budget_out_of_reach_costs_a_bounded_number_of_trials(sites):
    names = {f"s{index}": 1 / sites for index in range(sites)}
    search = searched(lambda floats: 0.0, names, 1.0)
    assert not search.best.within
    assert len(search.trials) <= 66 + 2 * math.log2(sites)


def test_many_sites_of_which_all_are_needed_cost_a_bounded_number_of_trials():
    names = {f"s{index}": 1 / 300 for index in range(300)}
    search = searched(lambda floats: float(len(floats) >= 200), names, 1.0)
    assert len(search.best.candidate.floats) in range(200, 203)
    assert len(search.trials) <= 66 + 2 * math.log2(300)


def test_two_cheap_sites_are_left_float_and_not_the_costly_one_that_is_more_sensitive():
    bench = Landscape(0, 3, 0.0)
    bench.loss = {"s0": 0.03, "s1": 0.02, "s2": 0.02}
    bench.share = {"s0": 0.5, "s1": 0.01, "s2": 0.01}
    bench._costs = [
        SiteCost(name, "", bench.share[name], -10 * math.log10(loss))
        for name, loss in bench.loss.items()
    ]
    search = Search(bench, (), -0.035, lambda trial: None)
    search.run()
    assert search.best.candidate.floats == {"s1", "s2"}


def test_an_exchange_mends_what_the_estimate_had_wrong():
    costs = [
        SiteCost("big", "", 0.6, 10.0),
        SiteCost("a", "", 0.1, 18.0),
        SiteCost("b", "", 0.1, 40.0),
    ]
    enough = ({"big"}, {"a", "b"}, {"big", "a"}, {"big", "b"})

    class Bench(Landscape):
        def measure(self, candidate):
            return Measured(float(candidate.floats in enough), 0.0)

        repeat = measure

        def estimates(self, levers):
            return estimates(costs)

    search = Search(Bench(0, 3, 0.0), (), 1.0, lambda trial: None)
    search.run()
    assert search.best.candidate.floats == {"a", "b"}


LEVERS = (Lever("histogram", {"a": {"observer": "histogram"}}), Lever("8 bits", {"a": {"x": 1}}))


class WithLevers:
    """A bench of two levers and one site, whose gains are told."""

    def __init__(self, **gains):
        self.gains = gains

    def measure(self, candidate):
        names = [lever.what for lever in candidate.levers] + sorted(candidate.floats)
        return Measured(math.fsum(self.gains.get(name, 0.0) for name in names), 0.0)

    repeat = measure

    def estimates(self, levers):
        return estimates([SiteCost("site", "", 0.2, 10.0), SiteCost("other", "", 0.8, 20.0)])


@pytest.mark.parametrize(
    ("gains", "kept", "floats"),
    [
        ({"histogram": 0.01, "8 bits": 0.01, "site": 1.0}, [], {"site"}),  # too little to bind
        ({"histogram": 0.3, "8 bits": 0.3, "site": 1.0}, [], {"site"}),  # taken back
        ({"histogram": 0.3, "8 bits": 0.3, "site": 0.7}, ["histogram"], {"site"}),
        ({"histogram": 0.3, "8 bits": 0.3, "site": 0.4}, ["histogram", "8 bits"], {"site"}),
        ({"histogram": 0.3, "8 bits": 1.0}, ["8 bits"], set()),
    ],
)
def test_only_levers_that_are_needed_stay(gains, kept, floats):
    search = Search(WithLevers(**gains), LEVERS, 1.0 - 1e-9, lambda trial: None)
    search.run()
    assert [lever.what for lever in search.best.candidate.levers] == kept
    assert search.best.candidate.floats == floats


def test_what_was_chosen_from_several_is_measured_once_more():
    class Lucky(Table):
        def repeat(self, candidate):
            return Measured(0.5, 0.0)

    bench = Lucky(lambda floats: float(bool(floats)), {"a": 0.5, "b": 0.5})
    search = Search(bench, (), 1.0, lambda trial: None)
    search.run()
    last = search.trials[-1]
    assert last.is_repeated
    assert last.candidate == search.best.candidate
    assert (last.metric, last.within, last.kept) == (0.5, False, False)


def test_sites_go_by_their_errors_or_else_by_their_places():
    def of(*sqnrs):
        return list(
            errors_of([SiteCost(str(n), "", 0.1, db) for n, db in enumerate(sqnrs)]).values()
        )

    assert of(10.0, 20.0) == pytest.approx([0.1, 0.01])
    assert of(None, None) == [1.0, 0.5]
    assert of(None, 20.0, None) == pytest.approx([0.01, 0.01, 0.0])  # NaN first, exact last


def test_each_of_the_cheapest_sets_takes_away_more_error_than_the_ones_before():
    errors = {"a": 3.0, "b": 2.0, "c": 2.0}
    shares = {"a": 0.5, "b": 0.1, "c": 0.1}
    sets = cheapest_sets(errors, shares)
    assert [sorted(names) for names in sets] == [["b"], ["b", "c"], ["a", "b"], ["a", "b", "c"]]
    assert cheapest_sets({}, {}) == []
    assert [len(names) for names in cheapest_sets(errors, dict.fromkeys(errors, 0.0))] == [1, 2, 3]


def measured_trials(*points):
    """Trials with these latencies and metrics."""
    return [
        Trial(str(place), Candidate(), metric, True, True, 0.0, None, latency=latency)
        for place, (latency, metric) in enumerate(points)
    ]


def test_the_front_has_what_is_more_accurate_than_anything_faster():
    trials = measured_trials((0.5, 0.7), (0.9, 0.9), (0.7, 0.6), (0.5, 0.8), (None, 1), (0.1, None))
    again = replace(trials[0], latency=0.1, metric=0.95, is_repeated=True)
    assert [trial.what for trial in front_of([*trials, again])] == ["3", "1"]
    assert front_of([]) == ()
