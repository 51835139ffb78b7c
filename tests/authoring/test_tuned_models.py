"""What kinds of models, batches and recipes a search takes, and how it leaves them."""

from __future__ import annotations

import warnings

import pytest
import torch
from differential import snapshot
from nets import UNTRACEABLE
from plans import net_of
from runs import silent
from torch import nn
from tuning import FEW, cancelling, closeness, full_loss, tuned

import qrecipe
from qrecipe.errors.findings import QRecipeWarning

pytestmark = pytest.mark.usefixtures("only_sites")


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
