"""Overlays of thousands of sites, and a search that meets one which does not load."""

from __future__ import annotations

import json

import pytest
import torch
from plans import net_of
from runs import STATIC
from torch import nn
from tuning import closeness, tuned

import qrecipe
from qrecipe.errors.findings import QRecipeWarning, RecipeSyntaxError
from qrecipe.recipe.overlay import float_rules, overlay_recipe, save_overlay


def rules(count):
    reasons = {f"blocks.{i}.attn.proj": "31.2 dB when quantized alone" for i in range(count)}
    return float_rules(reasons)


def named(recipe):
    return [rule for rule in recipe.rules if rule.tier == "module_name"]


def test_an_overlay_of_thousands_of_sites_is_written_and_read_with_its_reasons(tmp_path):
    save_overlay(STATIC, rules(1_600), tmp_path / "overlay.toml")
    read = qrecipe.load_recipe(tmp_path / "overlay.toml")
    assert [rule.reason for rule in named(read)] == ["31.2 dB when quantized alone"] * 1_600


def test_an_overlay_of_more_sites_goes_without_reasons():
    made = overlay_recipe(qrecipe.load_recipe("builtin:x86-static"), rules(5_200))
    assert [(rule.qconfig, rule.reason) for rule in named(made)] == [(None, None)] * 5_200


@pytest.mark.slow
def test_an_overlay_of_more_sites_than_a_recipe_may_hold_is_refused_with_the_bound():
    overlay_recipe(STATIC, rules(19_900))
    with pytest.raises(RecipeSyntaxError, match="QR002 the recipe has more than 20,000 keys"):
        overlay_recipe(STATIC, rules(20_000))


def test_a_search_survives_candidates_whose_overlay_does_not_load(tmp_path, monkeypatch):
    torch.manual_seed(0)
    layers = {name: nn.Linear(16, 16) for name in ("a", "b", "c")}
    model = net_of(lambda self, x: self.a(x) + self.b(x) + self.c(x), **layers)
    batches = [torch.randn(32, 16) for _ in range(3)]
    honest = overlay_recipe
    monkeypatch.setattr("qrecipe.authoring.tune.tune.levers_of", lambda *args: ())

    def bounded(base, values):
        if len(values.get("rules", {}).get("module_name", {})) == 2:
            return qrecipe.parse_recipe("x = 1\n" * 20_001)
        return honest(base, values)

    monkeypatch.setattr("qrecipe.authoring.tune.trials.overlay_recipe", bounded)
    log = tmp_path / "trials.json"
    evaluate = closeness(model, batches)
    with pytest.warns(QRecipeWarning, match="QR219"):
        result = tuned(model, batches, evaluate, max_drop=0.0, max_trials=6, resume=log)
    failed = [trial for trial in result.trials if trial.error is not None]
    assert failed
    assert all("QR002 the recipe has more than" in trial.error for trial in failed)
    assert {len(trial.candidate.floats) for trial in failed} == {2}
    assert any(len(t.candidate.floats) == 1 and t.metric is not None for t in result.trials)
    assert len(result.recipe.rules) > 1
    assert len(json.loads(log.read_text())["trials"]) == len(result.trials)
    with pytest.warns(QRecipeWarning, match="QR219"):
        again = tuned(model, batches, evaluate, max_drop=0.0, max_trials=6, resume=log)
    assert again.trials == result.trials
