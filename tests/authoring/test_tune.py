"""The search for a recipe within an accuracy budget."""

from __future__ import annotations

import json
import math
import random
import warnings

import pytest
import torch
from differential import snapshot
from nets import NETS, UNTRACEABLE
from plans import net_of
from runs import silent
from shares import every
from torch import nn
from tuning import FEW, base, cancelling, closeness, full_loss, in_float_time, tuned

import qrecipe
from qrecipe.authoring.fastest.costs import Costs, SitePrice
from qrecipe.authoring.tune.estimates import Estimates
from qrecipe.authoring.tune.levers import Candidate
from qrecipe.authoring.tune.trials import ModelBench
from qrecipe.authoring.tune.trying import Trying
from qrecipe.errors.findings import (
    CalibrationError,
    ExecutionError,
    QRecipeError,
    QRecipeWarning,
    RecipeError,
)
from qrecipe.measure.turns import Latency

pytestmark = pytest.mark.usefixtures("only_sites")


def test_a_recipe_within_the_budget_is_kept_as_it_is():
    net = NETS["mlp"]
    model, batches = net.model(), net.batches(3)
    result = tuned(model, batches, closeness(model, batches), max_drop=1.0)
    assert result.reached
    assert result.float_sites == ()
    assert [(t.what, t.kept, t.within) for t in result.trials] == [
        ("the unchanged recipe", True, True)
    ]
    assert not any(rule.tier == "module_name" for rule in result.recipe.rules)


def test_the_search_survives_that_skipping_the_worst_layer_makes_things_worse(monkeypatch):
    shares = in_float_time(a=0.4, b=0.2, c=0.2)  # measured times would decide where to begin
    monkeypatch.setattr("qrecipe.authoring.tune.trials.ModelBench._priced", lambda *args: shares)
    model, batches = cancelling()
    evaluate = closeness(model, batches)
    loss = full_loss(model, batches, evaluate)
    result = tuned(model, batches, evaluate, max_drop=loss / 2)
    whole = result.trials[0]
    (worst_float,) = [t for t in result.trials if t.what.startswith("the most sensitive site")]
    assert worst_float.candidate.floats in ({"a"}, {"b"})
    assert worst_float.metric < 10 * whole.metric < 0
    assert result.reached
    assert result.float_sites == ("c",)
    assert result.metric >= -loss / 2


def test_what_is_found_is_what_its_recipe_gives():
    model, batches = cancelling()
    evaluate = closeness(model, batches)
    result = tuned(model, batches, evaluate, max_drop=full_loss(model, batches, evaluate) / 2)
    converted = qrecipe.quantize(model, result.recipe, batches, progress=silent)
    assert evaluate(converted) == result.metric
    (rule,) = [rule for rule in result.recipe.rules if rule.tier == "module_name"]
    assert rule.key == "c"
    assert rule.qconfig is None
    whole = result.trials[0].metric
    assert f"with it in int8 the accuracy is {whole:.6g}, with it float 0" in rule.reason
    assert "Reached" in result.recipe.description


def test_sites_whose_return_stays_within_the_budget_are_int8_again():
    net = NETS["residual"]
    model, batches = net.model(), net.batches(3)
    evaluate = closeness(model, batches)
    loss = full_loss(model, batches, evaluate)
    result = tuned(model, batches, evaluate, max_drop=loss / 3)
    assert result.reached
    assert result.float_sites
    best = next(t for t in result.trials if t.candidate.floats == set(result.float_sites))
    for name in result.float_sites:  # not one of them could be given up
        fewer = Candidate((), best.candidate.floats - {name})
        (tried,) = [t for t in result.trials if t.candidate == fewer]
        assert not tried.within


class Unequal(nn.Module):
    """Loud branches with large errors, and a soft one that alone is judged."""

    def __init__(self):
        super().__init__()
        self.loud = nn.ModuleList(self.branch() for _ in range(3))
        self.soft = self.branch()
        with torch.no_grad():
            for branch in self.loud:
                branch[0].weight[0].mul_(100)
                branch[2].weight[0].mul_(30)
                branch[2].weight[:, 0].div_(100)
                branch[4].weight[:, 0].div_(3000)

    @staticmethod
    def branch():
        layers = [nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)]
        return nn.Sequential(*layers)

    def forward(self, x):
        return sum(branch(x) for branch in self.loud), self.soft(x)


@pytest.mark.slow
def test_a_block_is_found_where_its_sites_hide_at_the_end_of_the_ranking(monkeypatch):
    """The ranking goes by the whole output, the evaluation by a part of it."""
    torch.manual_seed(0)
    model, batches = Unequal().eval(), [torch.randn(32, 16) for _ in range(3)]
    judged = net_of(lambda self, x: self.model(x)[1], model=model)
    of_judged = closeness(judged, batches)
    evaluate = lambda candidate: of_judged(lambda x: candidate(x)[1])  # noqa: E731
    allowed = 0.01 * full_loss(model, batches, evaluate)
    options = {"max_drop": allowed, "max_trials": 17}
    result = tuned(model, batches, evaluate, **options)
    assert result.reached
    assert {site.partition(".")[0] for site in result.float_sites} == {"soft"}
    assert "only the block soft float" in [trial.what for trial in result.trials if trial.within]
    monkeypatch.setattr(Estimates, "blocks", lambda estimates: [])
    with pytest.warns(QRecipeWarning, match="QR219"):
        assert not tuned(model, batches, evaluate, **options).reached


def exactly(model, batches):
    """1 for a model that gives the very bits of the float model, else 0."""
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    return lambda other: float(
        all(torch.equal(other(b), e) for b, e in zip(batches, expected, strict=True))
    )


def test_a_budget_that_no_recipe_meets_is_told_with_the_distance_and_points_to_training():
    net = NETS["mlp"]
    model, batches = net.model(), net.batches(3)
    with pytest.warns(QRecipeWarning, match=r"QR219.*misses the budget by 0.5"):
        result = tuned(model, batches, exactly(model, batches), max_drop=0.5)
    assert not result.reached
    assert result.metric == 0
    assert result.distance == 0.5
    assert result.stopped is None
    assert len(result.trials) > 2
    assert not any(trial.within for trial in result.trials)
    assert "Not reached" in str(result)
    assert 'phase = "qat"' in str(result)
    assert 'phase = "qat"' in result.recipe.description


def test_the_best_that_misses_the_budget_is_the_best_of_all_trials():
    net = NETS["mlp"]
    model, batches = net.model(), net.batches(3)
    with pytest.warns(QRecipeWarning, match="QR219"):
        result = tuned(model, batches, closeness(model, batches), max_drop=0.0)
    assert result.metric == max(trial.metric for trial in result.trials)
    converted = qrecipe.quantize(model, result.recipe, batches, progress=silent)
    assert closeness(model, batches)(converted) == result.metric


@pytest.mark.parametrize("limit", every(2, [1, 2, 4]))
def test_no_more_trials_than_allowed(limit):
    model, batches = cancelling()
    calls = []
    evaluate = closeness(model, batches)
    with pytest.warns(QRecipeWarning, match="QR219"):
        result = tuned(
            model,
            batches,
            lambda candidate: calls.append(0) or evaluate(candidate),
            max_drop=0.0,
            max_trials=limit,
        )
    assert len(result.trials) == limit
    assert len(calls) == limit + 1  # and the float model
    assert result.stopped == "trials"
    assert "Stopped after the maximum number of trials" in str(result)


def test_no_trial_starts_after_the_time_but_the_first(monkeypatch):
    model, batches = cancelling()
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr("qrecipe.authoring.tune.trials.time.monotonic", lambda: next(clock))
    with pytest.warns(QRecipeWarning, match="QR219"):
        result = tuned(model, batches, closeness(model, batches), max_drop=0.0, max_seconds=1)
    assert len(result.trials) == 1
    assert result.stopped == "seconds"


@pytest.mark.parametrize(
    "options",
    [
        {"max_drop": -0.1},
        {"max_drop": math.nan},
        {"max_drop": math.inf},
        {"max_drop": "0.1"},
        {"max_drop": None},
        {"max_drop": True},
        {"max_trials": 0},
        {"max_trials": 1.5},
        {"max_trials": "3"},
        {"max_trials": True},
        {"max_seconds": 0},
        {"max_seconds": math.nan},
        {"max_seconds": "3"},
        {"max_seconds": True},
    ],
)
def test_bounds_that_make_no_sense_are_findings(options):
    model, batches = cancelling()
    with pytest.raises(ExecutionError, match="QR333"):
        tuned(model, batches, closeness(model, batches), **options)


@pytest.mark.parametrize(
    ("evaluate", "code"),
    [
        (lambda model: math.nan, "QR330"),
        (lambda model: math.inf, "QR330"),
        (lambda model: "good", "QR423"),
        (lambda model: 1 / 0, "QR423"),
    ],
)
def test_an_evaluation_without_a_number_is_a_finding(evaluate, code):
    model, batches = cancelling()
    with pytest.raises(ExecutionError, match=code):
        tuned(model, batches, evaluate)


def test_a_candidate_whose_accuracy_is_no_number_is_a_failed_trial():
    model, batches = cancelling()
    values = iter([1.0, 0.5, math.nan])
    with pytest.warns(QRecipeWarning, match="QR219"):
        result = tuned(model, batches, lambda model: next(values), max_trials=2)
    assert result.trials[1].metric is None
    assert result.trials[1].error == "evaluate returns no finite number"
    assert "failed" in str(result)
    assert result.metric == 0.5


def failing_at(call, evaluate):
    calls = []

    def failing(model):
        calls.append(0)
        if len(calls) == call:
            raise RuntimeError("out of memory")
        return evaluate(model)

    return failing


def test_an_evaluation_that_fails_for_one_candidate_is_a_failed_trial_and_the_search_goes_on():
    model, batches = cancelling()
    evaluate = closeness(model, batches)
    loss = full_loss(model, batches, evaluate)
    result = tuned(model, batches, failing_at(4, evaluate), max_drop=loss / 2)
    assert [trial.error is None for trial in result.trials[:4]] == [True, True, False, True]
    assert "evaluate failed: RuntimeError: out of memory" in result.trials[2].error
    assert "out of memory" in str(result)
    assert result.float_sites == ("c",)


def test_an_evaluation_that_fails_before_any_trial_was_through_is_an_error():
    model, batches = cancelling()
    evaluate = failing_at(2, closeness(model, batches))
    with pytest.raises(ExecutionError, match=r"QR423.*out of memory"):
        tuned(model, batches, evaluate)


def test_an_evaluation_that_is_noise_reaches_no_budget(monkeypatch):
    model, batches = cancelling()
    # no metric depends on the candidate, so that none has to be made
    monkeypatch.setattr("qrecipe.authoring.tune.trying.simulate", lambda model, *_, **__: model)
    draw = random.Random(0)
    reached = 0
    for _ in range(10):
        values = iter([1.0, *(0.97 + draw.gauss(0, 0.005) for _ in range(40))])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QRecipeWarning)
            result = tuned(model, batches, lambda _, values=values: next(values), max_drop=0.02)
        within = any(trial.within for trial in result.trials)
        reached += result.reached
        if within and len(result.trials) > 1 and not result.reached:
            assert "the evaluation is noisy" in str(result)
            assert result.metric == result.trials[-1].metric < 0.98
            assert result.distance == pytest.approx(0.98 - result.metric)
    assert reached < 3


def test_what_the_recipe_itself_leaves_float_is_named():
    model, batches = cancelling()
    recipe = base('[rules.module_name]\n"a" = "float"\n[rules.function]\nsub = "float"\n')
    result = tuned(model, batches, closeness(model, batches), recipe, max_drop=1e9)
    assert result.float_sites == ()
    assert result.base_float_sites == ("a",)
    said = "with no sites left float by the search"
    assert said in str(result)
    assert "The base recipe itself leaves 1 site float: a." in str(result)
    assert said in result.recipe.description
    assert json.loads(result.to_json())["base_float_sites"] == ["a"]


def test_what_is_float_anyway_is_counted_apart():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(torch.sin(self.a(x)))

    torch.manual_seed(0)
    model, batches = Net().eval(), [torch.rand(8, 4) for _ in range(10)]
    result = tuned(model, batches, closeness(model, batches), base(), max_drop=1e9)
    assert result.float_anyway == (":sin",)
    assert result.base_float_sites == result.float_sites == ()
    assert "with no sites left float by the search" in str(result)
    assert "Float anyway, without a kernel or after a float site: 1 site." in str(result)
    assert json.loads(result.to_json())["float_anyway"] == [":sin"]


def test_the_figures_hold_no_minus_zero():
    model, batches = cancelling()
    result = tuned(model, batches, lambda model: -0.0, max_drop=0)
    assert "-0" not in str(result)


def test_labelled_batches_are_told_of_before_anything_is_evaluated():
    model, batches = cancelling()
    labelled = [(batch, torch.zeros(32)) for batch in batches]
    with pytest.raises(CalibrationError, match="QR402"):
        tuned(model, labelled, lambda model: pytest.fail("evaluated"))


def test_forward_and_batches_that_come_once_are_taken():
    model, batches = cancelling()
    evaluate = closeness(model, batches)
    result = tuned(
        model,
        ((batch, torch.zeros(32)) for batch in batches),
        evaluate,
        max_drop=full_loss(model, batches, evaluate) / 2,
        forward=lambda net, batch: net(batch[0]),
    )
    assert result.float_sites == ("c",)


def test_the_callers_model_stays_as_it_was():
    model, batches = cancelling()
    before = snapshot(model)
    evaluate = closeness(model, batches)
    tuned(model, batches, evaluate, max_drop=full_loss(model, batches, evaluate) / 2)
    assert snapshot(model) == before


def test_a_model_in_training_mode_is_evaluated_in_eval_mode():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)).train()
    seen = []
    with pytest.warns(QRecipeWarning, match="QR202"):
        tuned(model, [torch.randn(4, 6)] * 3, lambda m: seen.append(m.training) or 1.0)
    assert seen == [False, False]
    assert model.training


def test_a_recipe_for_training_is_tuned_without_and_stays_one():
    model, batches = cancelling()
    evaluate = closeness(model, batches)
    recipe = qrecipe.parse_recipe(
        f'format = 1\nextends = "builtin:x86-static"\nphase = "qat"\n{FEW}'
    )
    loss = full_loss(model, batches, evaluate)
    result = tuned(model, batches, evaluate, recipe, max_drop=loss / 2)
    assert result.float_sites == ("c",)
    assert result.recipe.phase == "qat"


def test_a_model_that_cannot_be_traced_is_tuned_module_by_module():
    model, batches = UNTRACEABLE.model(), UNTRACEABLE.batches(3)
    evaluate = closeness(model, batches)
    recipe = qrecipe.parse_recipe(f'format = 1\nextends = "builtin:x86-dynamic"\n{FEW}')
    whole = qrecipe.quantize(model, recipe, batches, progress=silent)
    result = tuned(model, batches, evaluate, recipe, max_drop=-evaluate(whole) / 2)
    assert result.reached
    assert 0 < len(result.float_sites) < 3


def test_a_model_without_floating_outputs_is_ranked_by_the_evaluation():
    torch.manual_seed(0)
    model = net_of(
        lambda self, x: self.b(torch.relu(self.a(x))).argmax(1),
        a=nn.Linear(8, 32),
        b=nn.Linear(32, 10),
    )
    batches = [torch.randn(64, 8) for _ in range(3)]
    expected = [model(batch) for batch in batches]

    def agreement(other):
        return (
            sum(
                float((other(b) == e).float().mean())
                for b, e in zip(batches, expected, strict=True)
            )
            / 3
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QRecipeWarning)
        result = tuned(model, batches, agreement, max_drop=0.0)
    assert result.trials[0].metric < 1
    reasons = [rule.reason for rule in result.recipe.rules if rule.tier == "module_name"]
    assert all("instead of 1 when quantized alone" in reason for reason in reasons)
    assert len(result.trials) > 1


def test_the_result_is_written_as_a_file_that_extends_its_base(tmp_path):
    model, batches = cancelling()
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "base.toml").write_text(f'format = 1\nextends = "builtin:x86-static"\n{FEW}')
    recipe = qrecipe.load_recipe(tmp_path / "base.toml")
    evaluate = closeness(model, batches)
    loss = full_loss(model, batches, evaluate)
    result = tuned(model, batches, evaluate, recipe, max_drop=loss / 2)
    result.save(tmp_path / "tuned.toml")
    saved = qrecipe.load_recipe(tmp_path / "tuned.toml")
    assert 'extends = "./base.toml"' in (tmp_path / "tuned.toml").read_text()
    assert saved.fingerprint == result.recipe.fingerprint
    assert saved.description == result.recipe.description
    document = json.loads(result.to_json())
    assert document["float_sites"] == ["c"]
    assert qrecipe.parse_recipe(document["recipe"]).fingerprint == saved.fingerprint


def test_errors_of_the_recipe_as_it_is_are_the_callers():
    model, batches = cancelling()
    recipe = base('[rules.module_name]\n"nowhere" = "float"\n')
    with pytest.raises(QRecipeError, match="QR301"):
        tuned(model, batches, closeness(model, batches), recipe)


def test_a_search_where_nothing_is_quantized_says_so():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1)).eval()
    model[0].register_forward_hook(lambda module, args, output: None)
    with pytest.warns(QRecipeWarning, match="QR221 nothing is quantized"):
        result = qrecipe.tune(
            model, "builtin:x86-dynamic", [torch.rand(2, 5, 16)], lambda net: 1.0, progress=silent
        )
    assert "Reached: 1 with nothing quantized." in result.notes
    assert [each["code"] for each in json.loads(result.to_json())["warnings"]] == ["QR221"]


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
