"""The order of the search, on tables of accuracies."""

from __future__ import annotations

from qrecipe.authoring.tune_search import Measured, Search, SiteCost


class Table:
    """A bench that looks accuracies up, for nets that one would have to search for."""

    def __init__(self, metric, shares):
        self.metric = metric
        self.shares = shares
        self.tried = []

    def measure(self, candidate):
        self.tried.append(candidate.floats)
        return Measured(self.metric(candidate.floats), 0.0)

    def costs(self, levers):
        return [SiteCost(name, "", share, None) for name, share in self.shares.items()]


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
    assert len(search.trials) < 14


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
