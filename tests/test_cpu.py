"""What a plan needs of the CPU, and what is said where the CPU lacks it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import qrecipe
from qrecipe.errors import QRecipeWarning

BATCHES = [torch.randn(4, 6) for _ in range(12)]


def silent(done, total):
    pass


def model():
    return nn.Sequential(nn.Linear(6, 6)).eval()


def test_eight_bit_activations_on_x86_need_vnni_and_the_plan_says_so():
    plan = qrecipe.plan(model(), "builtin:x86-vnni-static", BATCHES[0])
    assert plan.needs_vnni
    assert "needs a CPU with VNNI" in str(plan)
    assert json.loads(plan.to_json())["needs_vnni"] is True


@pytest.mark.parametrize("recipe", ["builtin:x86-static", "builtin:arm-static"])
def test_seven_bits_or_another_backend_need_no_vnni(recipe):
    assert not qrecipe.plan(model(), recipe, BATCHES[0]).needs_vnni


def test_a_cpu_without_vnni_gets_a_warning_and_provenance_keeps_the_need(monkeypatch):
    monkeypatch.setattr("qrecipe.pipeline.has_vnni", lambda: False)
    with pytest.warns(QRecipeWarning, match="QR204"):
        converted = qrecipe.quantize(model(), "builtin:x86-vnni-static", BATCHES, progress=silent)
    assert json.loads(qrecipe.provenance(converted).plan)["needs_vnni"] is True


def test_a_cpu_with_vnni_gets_none(monkeypatch, recwarn):
    monkeypatch.setattr("qrecipe.pipeline.has_vnni", lambda: True)
    qrecipe.quantize(model(), "builtin:x86-vnni-static", BATCHES, progress=silent)
    assert not [w for w in recwarn if issubclass(w.category, QRecipeWarning)]
