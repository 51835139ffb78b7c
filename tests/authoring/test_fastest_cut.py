"""The cheapest choice of float sites, of hand-made costs. Nothing is timed."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import chain, combinations

import pytest

from qrecipe.authoring.fastest.costs import Costs, SitePrice, TensorPrice
from qrecipe.authoring.fastest.cut import cheapest

MS = 1e-3


def chain_of(*times, conversion=0.1):
    """Sites in a row, as (float, int8) in milliseconds, and the tensors between them."""
    names = [f"s{number}" for number in range(len(times))]
    sites, tensors = [], [TensorPrice(None, ("s0",), conversion * MS, 0.0)]
    for number, (name, (in_float, int8)) in enumerate(zip(names, times, strict=True)):
        before = (names[number - 1],) if number else ()
        after = tuple(names[number + 1 : number + 2])
        seconds = None if int8 is None else int8 * MS
        sites.append(SitePrice(name, in_float * MS, in_float * MS, seconds, before))
        tensors.append(TensorPrice(name, after, conversion * MS, conversion * MS, not after))
    return Costs(tuple(sites), tuple(tensors))


def changed(costs, name, **changes):
    sites = (replace(site, **changes) if site.name == name else site for site in costs.sites)
    return replace(costs, sites=tuple(sites))


def test_a_slow_site_becomes_float_and_the_others_stay():
    costs = chain_of((2, 1), (0.4, 8.4), (2, 1))
    assert cheapest(costs) == {"s1"}
    assert costs.predicted({"s1"}) == pytest.approx(2.8 * MS)
    assert costs.predicted(()) == pytest.approx(10.6 * MS)


def test_a_loss_below_the_price_of_its_boundaries_is_accepted():
    assert cheapest(chain_of((2, 1), (0.4, 0.55), (2, 1))) == frozenset()
    assert cheapest(chain_of((2, 1), (0.4, 0.8), (2, 1))) == {"s1"}


def test_a_small_gain_does_not_pay_between_expensive_boundaries():
    assert cheapest(chain_of((1, 5), (1, 0.95), (1, 5))) == {"s0", "s1", "s2"}


def test_a_gain_of_less_than_a_tenth_moves_nothing():
    free = {"conversion": 0.0}
    assert cheapest(chain_of((1, 0.5), (1, 1.09), (1, 0.5), **free)) == frozenset()
    assert cheapest(chain_of((1, 0.5), (1, 1.13), (1, 0.5), **free)) == {"s1"}


def test_what_follows_a_float_site_is_float_too():
    slow = chain_of((1, 9), (3, 1), (2, 1))
    assert cheapest(slow) == {"s0"}
    assert cheapest(changed(slow, "s1", follows=True)) == {"s0", "s1"}
    dear = changed(chain_of((1, 9), (30, 1), (2, 1)), "s1", follows=True)
    assert cheapest(dear) == frozenset()


def test_what_cannot_be_int8_is_not_chosen():
    costs = chain_of((2, 1), (1, None), (2, 1))
    assert cheapest(costs) == frozenset()
    assert costs.predicted(()) == pytest.approx((1 + 1 + 1 + 4 * 0.1) * MS)


def test_a_tensor_is_converted_once_for_all_its_readers():
    sites = tuple(SitePrice(name, 1.0, 1.0, 0.9, ("stem",)) for name in "abc")
    stem = SitePrice("stem", 1.0, 1.0, None)
    costs = Costs((stem, *sites), (TensorPrice("stem", ("a", "b", "c"), 0.2, 0.2),))
    assert costs.predicted(()) == pytest.approx(1 + 2.7 + 0.2)
    assert costs.predicted({"a"}) == pytest.approx(1 + 2.8 + 0.2)
    assert costs.predicted({"a", "b", "c"}) == pytest.approx(4)


def test_a_dynamic_site_has_no_boundaries_and_is_chosen_alone():
    costs = changed(chain_of((2, 1), (2, 9), (2, 1)), "s1", keeps=False)
    assert costs.predicted(()) - costs.predicted({"s1"}) == pytest.approx(7 * MS)
    assert cheapest(costs) == {"s1"}


def test_float_sites_after_int8_are_timed_in_channels_last():
    costs = chain_of((2, 1), (1, 3), (1, 3))
    slow_there = changed(costs, "s1", channels_last=5 * MS)
    assert cheapest(costs) == {"s1", "s2"}
    assert cheapest(slow_there) == {"s2"}
    assert costs.in_channels_last({"s0"}) == {"s2"}
    assert costs.in_channels_last({"s0", "s1", "s2"}) == frozenset()


def random_costs(seed):
    draw = random.Random(seed)
    names = [f"s{number}" for number in range(draw.randint(2, 7))]
    producers = {
        name: tuple(n for n in names[:i] if draw.random() < 0.5) for i, name in enumerate(names)
    }
    sites = []
    for name in names:
        in_float = draw.randint(1, 40) * MS
        int8 = None if draw.random() < 0.1 else draw.randint(1, 40) * MS
        follows, keeps = draw.random() < 0.2, draw.random() < 0.9
        sites.append(
            SitePrice(name, in_float, in_float, int8, producers[name], keeps, follows and keeps)
        )
    tensors = [TensorPrice(None, tuple(names[:2]), draw.randint(0, 9) * MS, 0.0)]
    for name in names:
        readers = tuple(other for other in names if name in producers[other])
        prices = draw.randint(0, 9) * MS, draw.randint(0, 9) * MS
        tensors.append(TensorPrice(name, readers, *prices, draw.random() < 0.3))
    return Costs(tuple(sites), tuple(tensors))


def allowed(costs, floats):
    """Whether whatever follows a movable float site is float too."""
    by_name = {site.name: site for site in costs.sites}
    return all(
        site.int8 is None
        or site.name in floats
        or not any(p in floats and by_name[p].keeps for p in site.producers if site.follows)
        for site in costs.sites
    )


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_is_cheaper_by_the_prices_of_the_cut(seed):
    costs = random_costs(seed)
    priced = replace(
        costs,
        sites=tuple(
            site if site.int8 is None else replace(site, int8=site.int8 * 0.9)
            for site in costs.sites
        ),
    )
    movable = [site.name for site in costs.sites if site.int8 is not None]
    choices = chain.from_iterable(combinations(movable, size) for size in range(len(movable) + 1))
    best = min(priced.predicted(floats) for floats in choices if allowed(costs, floats))
    found = cheapest(costs)
    assert allowed(costs, found)
    assert priced.predicted(found) == pytest.approx(best)
