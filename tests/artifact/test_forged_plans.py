"""Recipes and plans with a right checksum that do not fit each other or the model."""

from __future__ import annotations

import base64
import json
import zlib

import pytest
import torch
from artifacts import (
    pack,
    parts,
    recipe,
    refused,
    stored,
    unpack,
)
from forgery import change_architecture, change_plan, forge, model

import qrecipe
from qrecipe.errors.findings import ArtifactError


def test_a_newer_format_is_named(file):
    tensors, metadata, content = parts(file)
    forge(file, tensors, {**metadata, "format": "qrecipe 2"}, content)
    assert "format 2" in refused(file, model(), "QR506")


@pytest.mark.parametrize("key", ["recipe", "fingerprint", "plan", "architecture", "needs"])
@pytest.mark.parametrize("value", ["", "null", "[]", "x" * 1000, "\0", "[" * 50_000])
def test_metadata_that_are_missing_or_nonsense_are_refused(file, key, value):
    tensors, metadata, content = parts(file)
    for text in (value, pack(value)):
        forge(file, tensors, {**metadata, key: text}, content)
        refused(file, model(), "QR505")


def test_a_text_that_unpacks_without_end_is_refused(file):
    tensors, metadata, content = parts(file)
    bomb = base64.b64encode(zlib.compress(bytes(2**26 + 1), 1)).decode()
    forge(file, tensors, {**metadata, "plan": bomb}, content)
    assert "more than" in refused(file, model(), "QR505")


def test_a_recipe_that_extends_another_reads_no_file(file, tmp_path):
    tensors, metadata, content = parts(file)
    text = 'extends = "builtin:x86-static"\n' + metadata["recipe"]
    forge(file, tensors, {**metadata, "recipe": text}, content)
    assert "extends" in refused(file, model(), "QR505")


def test_a_swapped_recipe_or_plan_is_refused(file, tmp_path):
    other = stored(tmp_path, "mlp", recipe('[rules.module_name]\nfc1 = "float"'))
    tensors, metadata, content = parts(file)
    _, others, _ = parts(other)
    for keys in (["recipe"], ["fingerprint"], ["plan"], ["recipe", "fingerprint"]):
        forge(file, tensors, {**metadata, **{key: others[key] for key in keys}}, content)
        refused(file, model(), "QR505")
    keys = ["recipe", "fingerprint", "plan"]
    forge(file, tensors, {**metadata, **{key: others[key] for key in keys}}, content)
    refused(file, model(), "QR507")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda plan: plan["sites"].pop(), "QR507"),
        (lambda plan: plan["sites"].append(plan["sites"][0]), "QR505"),
        (lambda plan: plan["sites"].append({**plan["sites"][0], "name": "more"}), "QR507"),
        (lambda plan: plan["sites"][0].update(name="other"), "QR507"),
        (lambda plan: plan["sites"][0].update(members=["fc1"]), "QR507"),
        (lambda plan: plan["sites"][0].update(verdict="float"), "QR505"),
        (lambda plan: plan["sites"][0].update(qconfig=None), "QR505"),
        (lambda plan: plan["sites"][0].update(mode="eager"), "QR505"),
        (lambda plan: plan["sites"][0].update(engine="../../x"), "QR505"),
        (lambda plan: plan["sites"][0].update(engine="onednn"), "QR505"),
        (lambda plan: plan["sites"][0]["qconfig"]["weight"].update(dtype="int3"), "QR505"),
        (lambda plan: plan["sites"][0]["qconfig"]["weight"].update(dtype="float16"), "QR505"),
        (lambda plan: plan["sites"][0]["qconfig"]["weight"].pop("dtype"), "QR505"),
        (
            lambda plan: plan["sites"][0]["qconfig"]["activation"].update(
                observer={"name": "placeholder", "x": 1}
            ),
            "QR505",
        ),
        (lambda plan: plan.update(backend="qnnpack"), "QR505"),
        (lambda plan: plan.update(phase="qat"), "QR505"),
        (lambda plan: plan.update(needs_vnni=True), "QR505"),
        (lambda plan: plan.update(is_for_export=True), "QR505"),
    ],
)
def test_a_forged_plan_is_refused(file, change, code):
    change_plan(file, change)
    refused(file, model(), code)


FLOAT = {"verdict": "float", "mode": None, "qconfig": None, "input": None}


def test_a_plan_that_the_recipe_does_not_give_is_refused(file, tmp_path):
    other = stored(tmp_path, "mlp", recipe('[rules]\nglobal = "float"'))
    _, metadata, _ = parts(file)
    tensors, others, content = parts(other)
    text = json.dumps(unpack(others["plan"])).replace(
        others["fingerprint"], metadata["fingerprint"]
    )
    own = {key: metadata[key] for key in ("recipe", "fingerprint")}
    forge(file, tensors, {**others, **own, "plan": pack(text)}, content)
    assert "the plan lists other rules" in refused(file, model(), "QR505")


@pytest.mark.parametrize("torch_release", [torch.__version__, "2.9.0"])
@pytest.mark.parametrize(
    ("change", "text", "in_any_release"),
    [
        ({**FLOAT, "reason": None}, "float without a reason", True),
        ({**FLOAT, "reason": "no kernel"}, "float, not quantized", False),
        ({"rule": {"tier": "global", "key": "", "says": "half"}}, "was decided by", True),
    ],
)
def test_a_site_is_what_its_rule_asks(file, change, text, in_any_release, torch_release):
    def forged(plan):
        site = plan["sites"][0]
        rule = change.get("rule", {})
        site.update({**change, "rule": {**site["rule"], **rule}})

    change_plan(file, forged)
    tensors, metadata, content = parts(file)
    versions = {**json.loads(metadata["versions"]), "torch": torch_release}
    forge(file, tensors, {**metadata, "versions": json.dumps(versions)}, content)
    if in_any_release or torch_release == torch.__version__:
        assert text in refused(file, model(), "QR505")
    else:
        refused(file, model(), "QR507")  # what a backend can do may differ, but not the graph


def test_a_text_of_the_file_cannot_steer_the_terminal(file):
    tensors, metadata, content = parts(file)
    forge(file, tensors, {**metadata, "format": "qrecipe 2\x1b[31m"}, content)
    with pytest.raises(ArtifactError) as caught:
        qrecipe.load_quantized(file, model())
    assert "\x1b" not in str(caught.value)
    change_architecture(file, lambda found: found["modules"].update({"\x1b[31m": "\x1b[0m"}))
    with pytest.raises(ArtifactError) as caught:
        qrecipe.load_quantized(file, model())
    assert "\x1b" not in str(caught.value)
