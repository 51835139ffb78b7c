"""What a search measures of time, and the front of accuracy against it."""

from __future__ import annotations

import json

import pytest
from shares import every
from tuning import base, cancelling, closeness, full_loss, tuned

import qrecipe
from qrecipe.authoring.fastest.costs import Costs, SitePrice
from qrecipe.authoring.tune.trials import ModelBench
from qrecipe.authoring.tune.trying import Trying
from qrecipe.errors.findings import RecipeError
from qrecipe.measure.turns import Latency

pytestmark = pytest.mark.usefixtures("only_sites")


def slow_in_int8(model, batches, name):
    """What each site of a model takes, had one a kernel that is slow in int8."""
    sites = qrecipe.plan(model, base(), batches[0]).sites
    slow, usual = {"int8": 9e-3}, {"int8": 1e-4}
    prices = (SitePrice(s.name, 4e-4, 4e-4, **(slow if s.name == name else usual)) for s in sites)
    return Costs(tuple(prices), ())


def test_a_site_that_is_slow_in_int8_is_left_float_too_with_both_reasons(monkeypatch):
    model, batches = cancelling()
    evaluate = closeness(model, batches)
    loss = full_loss(model, batches, evaluate)
    costs = slow_in_int8(model, batches, "c")
    monkeypatch.setattr(ModelBench, "_priced", lambda *args: costs)
    result = tuned(model, batches, evaluate, max_drop=loss / 2)
    assert result.float_sites == ("c",)
    (rule,) = [rule for rule in result.recipe.rules if rule.tier == "module_name"]
    assert rule.reason.startswith("int8 is 22 times slower here: 9 against 0.4 ms; ")
    assert "dB when quantized alone" in rule.reason
    assert len(result.trials) == 3  # the recipe as it is, this, and this again


def times_as_long(factor):
    return Latency.of([1.0] * 5, [float(factor)] * 5)


@pytest.mark.parametrize("factors", every(2, [(2, 3), (0.5, 0.5), (2, 1), (1, 2)]))
def test_a_recipe_that_is_slower_than_float_both_times_is_called_so(monkeypatch, factors):
    model, batches = cancelling()
    evaluate = closeness(model, batches)
    loss = full_loss(model, batches, evaluate)
    again = iter((*[factors[0]] * 2, factors[1]))  # the recipe as it is, the best, and that again
    monkeypatch.setattr(Trying, "_latency", lambda *args: times_as_long(next(again)))
    monkeypatch.setattr(ModelBench, "_priced", lambda *args: slow_in_int8(model, batches, "c"))
    result = tuned(model, batches, evaluate, max_drop=loss / 2)
    is_said = "It is slower than the float model here: 3 times its time" in "\n".join(result.notes)
    assert result.is_slower is is_said is (min(factors) > 1)
    assert "slower" not in result.recipe.description
    assert json.loads(result.to_json())["is_slower"] is is_said


def test_each_point_of_the_front_is_written_as_a_recipe(monkeypatch, tmp_path):
    model, batches = cancelling()
    evaluate = closeness(model, batches)
    loss = full_loss(model, batches, evaluate)
    latencies = iter(range(1, 100))  # each trial slower than the one before
    monkeypatch.setattr(Trying, "_latency", lambda *args: times_as_long(next(latencies)))
    result = tuned(model, batches, evaluate, max_drop=loss / 2)
    assert len(result.front) > 1
    result.save_front(tmp_path / "front")
    names = [f"{number}.toml" for number in range(1, len(result.front) + 1)]
    assert sorted(path.name for path in (tmp_path / "front").iterdir()) == names
    for name, trial in zip(names, result.front, strict=True):
        recipe = qrecipe.load_recipe(tmp_path / "front" / name)
        assert {r.key for r in recipe.rules if r.tier == "module_name"} == trial.candidate.floats
        assert f"{trial.metric + 0.0:.6g} in {trial.latency:.6g} of the float" in recipe.description
    with pytest.raises(RecipeError, match=r"QR001.*is not empty"):
        result.save_front(tmp_path / "front")


def test_latency_is_measured_unless_the_model_is_made_for_another_cpu():
    model, batches = cancelling()
    evaluate = closeness(model, batches)
    assert tuned(model, batches, evaluate, max_drop=1e9).trials[0].latency > 0
    other = tuned(model, batches, evaluate, max_drop=1e9, target_cpu="vnni")
    assert other.trials[0].latency is None
