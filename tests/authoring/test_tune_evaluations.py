"""Evaluations that fail, are noise or give no number, bounds and recipes that make no sense."""

from __future__ import annotations

import json
import math
import random
import warnings

import pytest
import torch
from runs import silent
from torch import nn
from tuning import base, cancelling, closeness, full_loss, tuned

import qrecipe
from qrecipe.errors.findings import (
    CalibrationError,
    ExecutionError,
    QRecipeError,
    QRecipeWarning,
)

pytestmark = pytest.mark.usefixtures("only_sites")


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


def test_labelled_batches_are_told_of_before_anything_is_evaluated():
    model, batches = cancelling()
    labelled = [(batch, torch.zeros(32)) for batch in batches]
    with pytest.raises(CalibrationError, match="QR402"):
        tuned(model, labelled, lambda model: pytest.fail("evaluated"))


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
