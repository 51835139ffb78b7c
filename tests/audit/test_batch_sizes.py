"""A model that was made with one batch size runs with others, or what fixes it is named."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from plans import net_of
from routed import recipe_of_roots
from runs import silent
from shares import every
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.execution import batch_sizes
from qrecipe.execution.batch_sizes import shortfall
from qrecipe.model.call import Inputs


def rows(size):
    return torch.rand(size, 5, 16, generator=torch.Generator().manual_seed(size)) - 0.5


def said(model, recipe, size, given=rows):
    """The converted model, and the warnings about batch sizes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        converted = qrecipe.quantize(model, recipe, [given(size)] * 2, progress=silent)
    texts = [str(each.message) for each in caught]
    return converted, [text for text in texts if text.startswith("QR235")]


# --- sizes that a root is given


class Attention(nn.Module):
    """Is told the size of its batch as a number."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x, size, heads=4):
        q, k, v = self.qkv(x).view(size, -1, 3, heads, 4).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(size, -1, 16))


class Telling(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        y = self.attention(x, int(x.shape[0]))
        return y if y.sum() < 1e9 else -y


@pytest.mark.parametrize("size", every(3, (1, 2, 6)))
def test_a_size_that_a_root_is_given_is_an_input_of_its_graph(size, tmp_path):
    torch.manual_seed(0)
    model = Telling().eval()
    converted, told = said(model, recipe_of_roots(["attention"]), size)
    assert told == []
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", Telling().eval())
    for other in (1, 2, 6):
        assert sqnr_db(model(rows(other)), converted(rows(other))) > 15
        assert torch.equal(loaded(rows(other)), converted(rows(other)))


def test_a_number_that_is_the_same_for_every_batch_stays_a_constant():
    compiled = qrecipe.compile(Telling().eval(), recipe_of_roots(["attention"]), rows(3))
    (part,) = compiled._architecture.parts
    assert part.constants == {"heads": 4}


# --- what is fixed to a size, by name


class Sized(nn.Module):
    """Reads a size that the code around it has written."""

    def __init__(self):
        super().__init__()
        self.fc, self.size = nn.Linear(16, 16), 2

    def forward(self, x):
        return self.fc(x).view(self.size, -1, 16)


def write_the_size(self, x):
    self.get_submodule(self.at).size = int(x.shape[0])
    y = self.body(x)
    return y if y.sum() < 1e9 else -y


def writing(body, at):
    model = net_of(write_the_size, body=body)
    model.at = at
    return model


@pytest.mark.parametrize(
    ("model", "name", "hint"),
    [
        (writing(Sized(), "body"), "body:view", 'remove "body" from [fx] roots'),
        (
            writing(nn.Sequential(nn.Linear(16, 16), Sized()), "body.1"),
            "body.1:view",
            'leave it float: [fx] non_traceable_module_name = ["body.1"]',
        ),
    ],
    ids=["root", "inside"],
)
def test_what_fixes_the_batch_size_is_named_with_its_line_and_a_way_out(model, name, hint):
    recipe = recipe_of_roots(["body"])
    _, (text,) = said(model, recipe, 2)
    first, second = text.splitlines()
    assert first.startswith("QR235 with a batch of 1, which the float model takes, ")
    assert re.search(rf"it was made with 2, and {name} at .*test_batch_sizes\.py:\d+ ", first)
    assert "view(self.size, -1, 16)` is fixed to that" in first
    assert second.strip() == hint
    if "non_traceable" in hint:
        key = hint.partition("[fx] ")[2]
        mended = qrecipe.parse_recipe(recipe.to_toml().replace("[fx]\n", f"[fx]\n{key}\n"))
        converted, told = said(model, mended, 2)
        assert told == []
        assert sqnr_db(model(rows(3)), converted(rows(3))) > 20


def test_a_plan_that_tries_fewer_samples_leaves_it_to_the_warning():
    body = Sized()
    body.size = 6
    _, (text,) = said(writing(body, "body"), recipe_of_roots(["body"]), 6)
    assert "it was made with 6, and body:view at " in text


def test_the_warning_can_be_accepted():
    text = recipe_of_roots(["body"]).to_toml() + '[lint]\nignore = ["QR235"]\n'
    assert said(writing(Sized(), "body"), qrecipe.parse_recipe(text), 2)[1] == []


# --- what is tried, and when nothing is claimed


def test_a_batch_is_tried_as_its_first_item_and_an_item_as_a_batch_of_two():
    tried = [Inputs((rows(size),)).of_another_size().batch_size for size in (1, 2, 5)]
    assert tried == [2, 1, 1]
    assert Inputs((rows(2), rows(3))).of_another_size() is None
    assert Inputs(("words",)).of_another_size() is None


def test_the_usual_model_runs_once_more_and_the_float_model_does_not(monkeypatch):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    ran = []
    original = batch_sizes.tried

    def counting(tried, inputs):
        ran.append((tried, inputs.batch_size))
        return original(tried, inputs)

    monkeypatch.setattr(batch_sizes, "tried", counting)
    said(model, "builtin:x86-static", 8)
    said(model, "builtin:x86-static", 1)
    assert [size for _, size in ran] == [1, 2]
    assert all(tried is not model for tried, _ in ran)


def twice_or_not(change):
    """Doubles its input, but changes the result for a batch of one."""
    return net_of(lambda self, x: change(x * 2) if x.shape[0] == 1 else x * 2)


def fail(x):
    raise RuntimeError("no kernel")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (fail, "fails: no kernel"),
        (lambda x: torch.cat([x, x]), "returns results of another size"),
        (lambda x: -x, "is -6.0 dB from float instead of inf"),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_failures_other_sizes_and_other_results_are_found(change, what, known):
    double = net_of(lambda self, x: x * 2)
    inputs = Inputs((rows(4),))
    found = shortfall(double, twice_or_not(change), inputs, rows(4) * 2 if known else None)
    if what.startswith("is") and not known:
        assert found is None  # only a run of the float model would tell
    else:
        assert found.what == what
        assert found.inputs.batch_size == 1


@pytest.mark.parametrize(
    "model",
    [twice_or_not(fail), net_of(lambda self, x: (x * 2).sum()), net_of(lambda self, x: x[0])],
    ids=["refuses", "a number", "one of the batch"],
)
def test_nothing_is_claimed_where_the_float_model_does_not_follow(model):
    inputs = Inputs((rows(4),))
    for output in (None, model(rows(4))):
        assert shortfall(model, twice_or_not(fail), inputs, output) is None


def test_a_scheme_that_is_as_coarse_at_its_own_size_is_not_the_sizes_fault():
    double, noisy = net_of(lambda self, x: x * 2), net_of(lambda self, x: x * 2 + x.sign() * 3)
    assert shortfall(double, noisy, Inputs((rows(4),)), rows(4) * 2) is None
