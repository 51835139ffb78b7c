"""Models of transformers and timm that hold what cannot be traced, caches and sizes."""

from __future__ import annotations

import pytest
import torch
from corpus import missing, torchvision
from routed import recipe_of_roots
from runs import silent

import qrecipe
from qrecipe.model.call import Inputs
from qrecipe.model.proposals import traceable_parts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


def words(size):
    torch.manual_seed(size)
    return {
        "input_ids": torch.randint(1, 99, (size, 12)),
        "attention_mask": torch.ones(size, 12, dtype=torch.long),
    }


@pytest.fixture
def bert():
    torchvision("models")  # transformers imports it too
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    return transformers.BertForSequenceClassification(config).eval()


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("roots", [False, True])
def test_a_bert_that_is_made_with_one_batch_size_runs_with_others(bert, size, roots):
    recipe = qrecipe.suggest(bert, words(size))
    if roots:
        recipe = recipe_of_roots(traceable_parts(bert, Inputs.from_batch(words(size))))
    converted = qrecipe.quantize(bert, recipe, [words(size)] * 10, progress=silent)
    for other in (1, 3, 4):
        assert converted(**words(other)).logits.shape == (other, 2)


def test_the_attention_biases_that_levit_keeps_are_no_state():
    torchvision("models")
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model, image = timm.create_model("levit_128s").eval(), torch.randn(1, 3, 224, 224)
    recipe = qrecipe.suggest(model, image)
    assert recipe.fx.roots == ()
    plan = qrecipe.plan(model, recipe, image)
    assert plan.executor == "fx"
    converted = qrecipe.quantize(model, recipe, [image] * 2, progress=silent)
    assert converted(torch.randn(3, 3, 224, 224)).shape == (3, 1000)
