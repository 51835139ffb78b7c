"""Plans with a right checksum that say something else about transforms than the recipe or model."""

from __future__ import annotations

import random
from dataclasses import asdict

import hostile_artifacts
import pytest
from artifacts import recipe, refused
from forgery import change_plan, model
from guarded import SMOOTH, Guarded, store_guarded
from nets import NETS

import qrecipe
from qrecipe.planning.plan import Group


@pytest.fixture(scope="module")
def equalized(tmp_path_factory):
    """A file of the net ``mlp``, with a chain."""
    path = tmp_path_factory.mktemp("equalized") / "net.safetensors"
    batches, table = NETS["mlp"].batches(), recipe("[transform.equalize]\nby = 'weights'")
    qrecipe.save_quantized(qrecipe.quantize(model(), table, batches, progress=False), path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def smoothed(tmp_path_factory):
    """A file of the model `Guarded`, with a product before a layer."""
    path = tmp_path_factory.mktemp("smoothed") / "net.safetensors"
    return store_guarded(path, SMOOTH).read_bytes()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sites": ["fc1", "fc3"]}, "fc3, which is not a site"),
        ({"exponents": [[1] * 16] * 2}, "a chain of 2 sites has 2 exponents"),
        ({"exponents": [[200] * 16]}, "more than a float holds"),
        ({"exponents": [[10**30] * 16]}, "more than a float holds"),
    ],
)
def test_a_forged_chain_is_refused(equalized, tmp_path, change, text):
    path = tmp_path / "spoilt.safetensors"
    path.write_bytes(equalized)
    change_plan(path, lambda plan: plan["chains"][0].update(change))
    assert text in refused(path, model(), "QR505")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sites": ["fc2", "_parameters"]}, "_parameters, which is not a site"),
        ({"sites": ["fc2", "fc2"]}, "fc2 is in a group twice"),
        ({"at": "forward"}, "forward, which is not a site"),
        ({"exponents": [-200] * 16}, "more than a float holds"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": 2.0}, "alpha is 2.0"),
    ],
)
def test_a_forged_group_is_refused(smoothed, tmp_path, change, text):
    path = tmp_path / "spoilt.safetensors"
    path.write_bytes(smoothed)
    change_plan(path, lambda plan: plan["groups"][0].update(change))
    assert text in refused(path, Guarded().eval(), "QR505")


STEP = {"name": "doubled", "tolerance": 0.0, "changed": ["fc1"]}


CHAIN = {"sites": ["fc1", "fc2"], "end": "", "exponents": []}


def test_a_plan_has_only_the_transforms_of_its_recipe(equalized, smoothed, tmp_path):
    path = tmp_path / "spoilt.safetensors"
    for stored, net, change, text in (
        (smoothed, Guarded().eval(), {"chains": [CHAIN]}, "has chains"),
        (equalized, model(), {"groups": [asdict(Group(("fc2",), "none"))]}, "has groups"),
        (equalized, model(), {"steps": [STEP]}, "lists other transforms"),
    ):
        path.write_bytes(stored)
        change_plan(path, lambda plan, change=change: plan.update(change))
        assert text in refused(path, net, "QR505")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"steps": [{**STEP, "tolerance": -1.0}]}, "tolerance of doubled"),
        ({"chains": [{**CHAIN, "sites": ["fc1", "fc9"]}]}, "fc9, which is not a site"),
        ({"chains": [{**CHAIN, "exponents": [[200] * 16]}]}, "more than a float holds"),
    ],
)
def test_what_was_done_before_a_recipe_without_transforms_is_checked_too(file, change, text):
    change_plan(file, lambda plan: plan.update(change))
    assert text in refused(file, model(), "QR505")


def test_attacks_on_a_smoothed_model_touch_nothing(smoothed, tmp_path):
    found = [
        hostile_artifacts.attack_case(random.Random(seed), tmp_path, smoothed) for seed in range(30)
    ]
    codes = {code for each in found for code in each.codes}
    assert {"accepted", "QR505", "QR507"} <= codes
