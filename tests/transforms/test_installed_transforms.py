"""Transforms of installed distributions."""

import sys

import pytest
import torch
from distributions import install
from plans import recipe
from torch import nn

import qrecipe
from qrecipe.recipe.json_schema import recipe_schema

pytestmark = pytest.mark.filterwarnings("ignore:.*QR2(03|07|08|34)")

BATCHES = 10 * [torch.randn(16, 6)]
_MODULE = """
import qrecipe

@qrecipe.register_transform("tidy")
class Tidy(qrecipe.Transform):
    def apply(self, model, context):
        pass
"""


def net():
    return nn.Sequential(nn.Linear(6, 4)).eval()


def test_a_claimed_name_is_known_and_imported_by_the_plan_alone(site):
    install(site, "acme", {"transform.tidy": "acme_tidy"}, acme_tidy=_MODULE)
    settings = recipe("[transform.tidy]\nenabled = true")
    assert "acme_tidy" not in sys.modules
    assert "tidy" in recipe_schema()["definitions"]["TransformTable"]["properties"]
    plan = qrecipe.plan(net(), settings, BATCHES[0])
    assert plan.steps == (qrecipe.Step("tidy", 0.0),)
    converted = qrecipe.quantize(net(), settings, BATCHES)
    assert qrecipe.provenance(converted).versions["acme"] == "1.0"


def test_a_broken_plugin_is_named_at_the_table(site):
    broken = _MODULE.replace("pass", "model.register_buffer('x', None)\n        1 / 0")
    install(site, "acme", {"transform.tidy": "acme_tidy"}, acme_tidy=broken)
    settings = recipe("[transform.tidy]\nenabled = true")
    with pytest.raises(qrecipe.PluginError) as caught:
        qrecipe.plan(net(), settings, BATCHES[0])
    (finding,) = caught.value.findings
    assert finding.code == "QR150"
    assert finding.location.line == 4
    assert "acme 1.0" in finding.message


def test_an_argument_that_the_class_rejects_is_found_by_the_plan(site):
    rejecting = _MODULE.replace(
        "    def apply",
        "    def __init__(self, at: int = 1):\n        if at > 1: raise ValueError('too far')\n"
        "    def apply",
    )
    install(site, "acme", {"transform.tidy": "acme_tidy"}, acme_tidy=rejecting)
    with pytest.raises(qrecipe.UnsupportedError, match=r"QR311.*too far"):
        qrecipe.plan(net(), recipe("[transform.tidy]\nat = 2"), BATCHES[0])
    with pytest.raises(qrecipe.UnknownNameError, match="QR105"):
        qrecipe.plan(net(), recipe("[transform.tidy]\nto = 2"), BATCHES[0])
