"""The search for a recipe within an accuracy budget."""

from __future__ import annotations

import json

import pytest
import torch
from nets import NETS
from plans import net_of
from runs import silent
from shares import every
from torch import nn
from tuning import FEW, base, cancelling, closeness, full_loss, in_float_time, tuned

import qrecipe
from qrecipe.authoring.tune.estimates import Estimates
from qrecipe.authoring.tune.levers import Candidate
from qrecipe.errors.findings import QRecipeWarning

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
