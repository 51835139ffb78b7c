"""What a file must not touch: the model that is given, and its class."""

from __future__ import annotations

import json
import random

import hostile_artifacts
import pytest
import torch
from artifacts import (
    parts,
    recipe,
    refused,
    with_recipe,
)
from forgery import change_architecture, forge
from guarded import OF_MODULES, Guarded, assert_unchanged, objects_of, state_of, store_guarded
from nets import NETS, Mlp
from shares import every

import qrecipe


def test_attacks_with_sound_checksums_touch_nothing(guarded, tmp_path):
    good = guarded.read_bytes()
    found = [
        hostile_artifacts.attack_case(random.Random(seed), tmp_path, good) for seed in range(60)
    ]
    codes = {code for each in found for code in each.codes}
    assert {"accepted", "QR505", "QR507"} <= codes


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    path = tmp_path_factory.mktemp("guarded") / "guarded.safetensors"
    return store_guarded(path)


def write_with_fx(path, good, table):
    """A file whose recipe has that ``[fx]`` table."""
    tensors, metadata, content = parts(good)
    text = f"{metadata['recipe']}\n[fx]\n{table}\n"
    forge(path, tensors, with_recipe(metadata, text), content)


OF_THE_MODEL = ("boom", "helper", "forward", "fc1.weight", "nothing", "fc1", "fc2")


@pytest.mark.parametrize("name", [*OF_THE_MODEL, *every(4, OF_MODULES)])
def test_no_name_in_a_recipe_reaches_into_the_model(name, guarded, tmp_path):
    path, net = tmp_path / "evil.safetensors", Guarded().eval()
    write_with_fx(path, guarded, f"preserved_attributes = [{json.dumps(name)}]")
    before = state_of(net)
    refused(path, net, "QR507")
    assert_unchanged(net, before)


@pytest.mark.parametrize(
    "table",
    [
        'roots = ["boom"]',
        'roots = ["_modules"]',
        'roots = ["fc1"]',
        'non_traceable_module_name = ["boom"]',
        'non_traceable_module_class = ["builtins.object"]',
    ],
)
def test_what_plan_refuses_for_a_model_is_refused_in_a_file(table, guarded, tmp_path):
    path, net = tmp_path / "evil.safetensors", Guarded().eval()
    write_with_fx(path, guarded, table)
    if table.startswith("roots"):
        root = table.split('"')[1]
        change_architecture(path, lambda found: found["parts"][0].update(path=root))
    before = state_of(net)
    text = refused(path, net, "QR507")
    assert "fx." in text
    assert_unchanged(net, before)


@pytest.mark.parametrize("names", [[], ["class_names", "KINDS", "LEVELS", "offset", "notes"]])
def test_a_loaded_model_has_nothing_of_the_given_one(names, guarded, tmp_path):
    path, net = tmp_path / "model.safetensors", Guarded().eval()
    write_with_fx(path, guarded, f"preserved_attributes = {json.dumps(names)}")
    before = state_of(net)
    loaded = qrecipe.load_quantized(path, net)
    assert_unchanged(net, before)
    assert not objects_of(net).keys() & objects_of(loaded).keys()
    assert all(getattr(loaded, name, None) is not None for name in names)
    assert not objects_of(Guarded.LEVELS).keys() & objects_of(loaded).keys()
    with torch.no_grad():
        loaded.gain.fill_(0)
        loaded.offset.fill_(0)
    loaded.register_forward_hook(lambda *_: pytest.fail("a hook of the loaded model was run"))
    net(NETS["mlp"].batches(1)[0])
    assert_unchanged(net, before)


class Selfish(Mlp):
    def __deepcopy__(self, memo):
        return self


def test_a_model_whose_copy_is_itself_is_not_written_to(file):
    net = Selfish().train()
    before = state_of(net)
    assert "copied" in refused(file, net, "QR507")
    assert_unchanged(net, before)
    with pytest.raises(qrecipe.PlanError, match="same modules"):
        qrecipe.plan(net.eval(), recipe(), NETS["mlp"].batches(1)[0])
