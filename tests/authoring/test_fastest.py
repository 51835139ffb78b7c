"""The fastest recipe. What is timed here is replaced by times that every machine has."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from nets import NETS, UNTRACEABLE
from routed import Routed
from runs import HEAD, silent
from torch import nn

import qrecipe
from qrecipe.authoring.fastest.costs import costs_of
from qrecipe.authoring.fastest.fastest import Race
from qrecipe.measure.profile.profile import bench_of, measured
from qrecipe.measure.turns import Speed, Timing

CALM = '[lint]\nignore = ["QR201", "QR203", "QR208", "QR221"]\n'
STATIC = qrecipe.parse_recipe(HEAD + CALM)
SLOW = "conv1"
MODULE = "qrecipe.authoring.fastest.fastest"


def ms(milliseconds):
    return Timing(milliseconds / 1000, 0.0)


def race(in_float, recipe, mixture=None):
    """A race with these milliseconds in each round."""
    times = (in_float, recipe) if mixture is None else (in_float, recipe, mixture)
    return Race(*([each / 1000] * 15 for each in times))


@pytest.fixture(scope="module")
def residual():
    """A bench, and what was measured on it."""
    net = NETS["residual"]
    bench = bench_of(net.model(), STATIC, net.batches(2), None, silent)
    return bench, measured(bench, silent)


def as_if(profile, int8):
    """The profile as if these milliseconds were the int8 time of the one slow site."""
    sites = [
        replace(
            site,
            float_time=ms(0.4),
            channels_last_time=ms(0.4),
            int8_time=ms(int8 if site.name == SLOW else 0.2),
            quantize_time=ms(0.01),
            dequantize_time=ms(0.01),
        )
        for site in profile.sites
    ]
    boundaries = [replace(each, time=ms(0.01)) for each in profile.boundaries]
    return replace(profile, sites=tuple(sites), boundaries=tuple(boundaries))


@pytest.fixture
def found(monkeypatch, residual):
    """Runs `qrecipe.fastest` as if these were the times; gives the mixture that raced too."""

    def run(result, recipe=STATIC, int8=8.4):
        def raced(bench, mixed, progress):
            raced.mixed = mixed
            return result

        bench, profile = residual
        if recipe is STATIC:
            monkeypatch.setattr(f"{MODULE}.bench_of", lambda *args: bench)
        monkeypatch.setattr(f"{MODULE}.measured", lambda *args: as_if(profile, int8))
        monkeypatch.setattr(f"{MODULE}.race", raced)
        net = NETS["residual"]
        found = qrecipe.fastest(net.model(), recipe, net.batches(2), progress=silent)
        return found, raced.mixed

    return run


def planned(recipe):
    net = NETS["residual"]
    return qrecipe.plan(net.model(), recipe, net.batches(1)[0])


def test_a_slow_site_is_left_float_with_the_reason(found):
    result, mixed = found(race(5, 20, 4))
    reason = "int8 is 21 times slower here: 8.4 against 0.4 ms"
    assert result.winner == "mixture"
    assert dict(result.reasons) == {SLOW: reason}
    assert result.is_faster_than_float
    plan = planned(result.recipe)
    assert plan[SLOW].verdict == "float"
    assert plan[SLOW].rule.reason == reason
    floats = [{s.name for s in each if s.verdict == "float"} for each in (planned(STATIC), plan)]
    assert floats[1] - floats[0] == {SLOW, "pool"}  # which follows it without a rule
    assert qrecipe.Plan.from_json(qrecipe.provenance(mixed).plan)[SLOW].verdict == "float"


def test_the_recipe_says_where_it_was_measured(found):
    result, _ = found(race(5, 20, 4))
    conditions = result.profile.conditions
    for text in (str(result), result.recipe.description):
        assert conditions.cpu in text
        assert f"torch {torch.__version__}" in text
        assert conditions.batch in text
        assert "thread" in text


def test_a_mixture_that_is_not_faster_leaves_the_recipe_as_it_is(found):
    result, mixed = found(race(5, 4, 4))
    assert mixed is not None
    assert result.winner == "recipe"
    assert result.reasons == {}
    assert "No site is moved: more sites in float are not faster" in str(result)
    assert "float is as fast here" not in str(result)
    assert planned(result.recipe).sites == planned(STATIC).sites


def test_a_small_gain_by_prediction_is_not_tried(found):
    result, mixed = found(race(5, 4), int8=0.5)
    assert mixed is None
    assert result.winner == "recipe"
    assert result.mixture_time is None
    assert "no choice of sites is predicted to save 10%" in str(result)


def test_where_float_is_as_fast_it_is_said(found):
    result, _ = found(race(4, 4), int8=0.2)
    assert result.winner == "recipe"
    assert not result.is_faster_than_float
    assert "float is as fast here" in str(result)


def test_where_noise_is_larger_than_the_difference_no_ratio_is_said(found):
    float_ms, int8_ms = (10.0, 12.0, 11.0, 15.0, 9.0, 14.0), (8.0, 11.0, 13.0, 9.0, 9.5, 10.0)
    noisy = Race([x / 1000 for x in float_ms], [x / 1000 for x in int8_ms])
    result, _ = found(noisy, int8=0.2)
    assert result.winner == "recipe"
    assert not result.is_faster_than_float
    assert "Float takes 10 ms (+3.3), the recipe as it is 9.1 ms (+1.6)." in str(result)
    assert "It is unclear whether that is faster than float" in str(result)
    assert "as fast here" not in str(result)


def test_how_much_faster_it_is_than_float_is_said(found):
    result, _ = found(race(5, 4), int8=0.2)
    assert "That is 1.25 times as fast as float." in str(result)


def test_a_backend_whose_models_run_elsewhere_is_refused(found):
    exported = qrecipe.parse_recipe(f'{HEAD}backend = "executorch"\n{CALM}')
    with pytest.raises(qrecipe.UnsupportedError, match=r"QR309 executorch has no kernels in torch"):
        found(race(5, 4), exported)


def test_where_float_is_faster_everything_is_left_float(found):
    result, _ = found(race(3, 20, 4))
    assert result.winner == "float"
    assert all(site.verdict == "float" for site in planned(result.recipe))
    assert result.reasons[SLOW] == "int8 is 21 times slower here: 8.4 against 0.4 ms"
    others = {reason for name, reason in result.reasons.items() if name != SLOW}
    assert others == {"float is faster here: the whole model takes 3 ms, quantized 20 ms"}


def test_a_mixture_that_cannot_be_quantized_is_told(found, monkeypatch):
    def fail(*args, **named):
        raise qrecipe.AuditError(qrecipe.Finding("QR413", "its kernel fails"))

    monkeypatch.setattr(f"{MODULE}.quantize", fail)
    result, mixed = found(race(5, 4))
    assert mixed is None
    assert result.winner == "recipe"
    assert "its kernel fails" in str(result)


def test_the_saved_overlay_extends_the_recipe_and_plans_alike(found, tmp_path):
    base = tmp_path / "base.toml"
    base.write_text(f'{HEAD}phase = "qat"\n{CALM}')
    result, _ = found(race(5, 20, 4), str(base))
    result.save(tmp_path / "fast.toml")
    saved = qrecipe.load_recipe(tmp_path / "fast.toml")
    assert 'extends = "./base.toml"' in (tmp_path / "fast.toml").read_text()
    assert saved.fingerprint == result.recipe.fingerprint
    assert saved.phase == "qat"
    document = json.loads(result.to_json())
    assert document["winner"] == "mixture"
    assert qrecipe.parse_recipe(document["recipe"]).fingerprint == saved.fingerprint


def test_inputs_of_roots_that_are_named_alike_are_tensors_of_their_own():
    torch.manual_seed(0)
    roots = qrecipe.parse_recipe(f'{HEAD}{CALM}[fx]\nroots = ["backbone", "head"]\n')
    bench = bench_of(Routed().eval(), roots, [torch.randn(4, 3, 8, 8)] * 2, None, silent)
    costs = costs_of(measured(bench, silent), bench.plan, bench.inventory.structure)
    given = {each.consumers: each.quantize for each in costs.tensors if each.producer is None}
    assert given.keys() == {("backbone.conv",), ("head.fc1",)}
    assert all(seconds > 0 for seconds in given.values())


def test_a_model_without_a_graph_is_chosen_for_by_its_modules(monkeypatch):
    def all_slow(bench, progress):
        profile = measured(bench, progress)
        slow = (replace(each, float_time=ms(1), int8_time=ms(2)) for each in profile.sites)
        return replace(profile, sites=tuple(slow))

    monkeypatch.setattr(f"{MODULE}.measured", all_slow)
    monkeypatch.setattr(f"{MODULE}.race", lambda *args: race(3, 20, 2))
    dynamic = qrecipe.parse_recipe(f'format = 1\nextends = "builtin:x86-dynamic"\n{CALM}')
    model, batches = UNTRACEABLE.model(), UNTRACEABLE.batches(2)
    result = qrecipe.fastest(model, dynamic, batches, progress=silent)
    assert result.winner == "mixture"
    assert all(s.verdict == "float" for s in qrecipe.plan(model, result.recipe, batches[0]))


def test_as_it_is_used():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    batches = [torch.randn(4, 16) for _ in range(2)]
    result = qrecipe.fastest(model, STATIC, batches, progress=silent)
    assert result.winner in ("recipe", "mixture", "float")
    assert min(result.float_time.seconds, result.recipe_time.seconds) > 0
    assert bool(result.reasons) == (result.winner != "recipe")
    qrecipe.quantize(model, result.recipe, batches, progress=silent)(batches[0])


def test_what_is_faster_beyond_noise():
    steady = [1.0, 1.01, 0.99, 1.0, 1.02]
    loaded = [1.0, 9.0, 2.0, 1.0, 3.0]  # the whole machine was slow in some rounds
    assert not Speed.of(steady, steady).is_faster
    assert not Speed.of([each * 0.98 for each in steady], steady).is_faster
    assert Speed.of([each * 0.9 for each in steady], steady).is_faster
    assert Speed.of([each * 0.9 for each in loaded], loaded).is_faster
    assert not Speed.of([0.5, 1.1, 0.5, 1.1, 1.1], steady).is_faster


@pytest.mark.parametrize(
    ("times", "winner", "is_won_by_int8"),
    [
        ((3, 2), "recipe", True),
        ((2, 2), "recipe", False),
        ((2, 3), "float", False),
        ((3, 2, 1), "mixture", True),
        ((3, 2, 2), "recipe", True),
        ((2, 3, 2), "mixture", False),
        ((1, 3, 2), "float", False),
    ],
)
def test_the_recipe_is_only_replaced_by_what_is_faster(times, winner, is_won_by_int8):
    decided = race(*times)
    assert decided.winner == winner
    assert decided.speed.is_faster is is_won_by_int8
