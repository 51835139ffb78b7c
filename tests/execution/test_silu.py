"""SiLU as the product of its input and a sigmoid, where a rule names it."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from plans import net_of, recipe, sites
from runs import silent
from shares import every
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.execution.fx.lowering import lower_ours

IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
NAMED = {
    "type": '[rules.module_type]\n"torch.nn.SiLU" = "int8"',
    "function": '[rules.function]\n"torch.nn.functional.silu" = "int8"',
    "site": '[rules.module_name]\nact = "int8"\n":silu" = "int8"',
}


def model():
    torch.manual_seed(0)
    return net_of(
        lambda self, x: self.last(F.silu(self.second(self.act(self.first(x))), inplace=True)),
        first=nn.Conv2d(3, 8, 3),
        act=nn.SiLU(inplace=True),
        second=nn.Conv2d(8, 8, 3),
        last=nn.Conv2d(8, 4, 3),
    )


def quantized(rules, head=""):
    compiled = qrecipe.compile(model(), recipe(rules, head=head), IMAGES)
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, [IMAGES] * 10, progress=silent)
    return compiled.plan, compiled.convert(prepared)


def test_without_a_rule_that_names_it_it_stays_float_and_the_plan_says_why():
    plan = sites(qrecipe.plan(model(), recipe(), IMAGES))
    for name in ("act", ":silu"):
        assert plan[name].verdict == "float"
        assert plan[name].reason == "faster in float: int8 SiLU is a sigmoid and a product"


@pytest.mark.parametrize("rule", NAMED)
def test_a_rule_that_names_it_makes_it_int8(rule):
    plan = sites(qrecipe.plan(model(), recipe(NAMED[rule]), IMAGES))
    assert plan["act"].mode == ("static" if rule != "function" else None)
    assert plan[":silu"].mode == ("static" if rule != "type" else None)


@pytest.mark.parametrize("backend", every(4, ["x86", "fbgemm", "onednn", "qnnpack"]))
def test_int8_silu_is_as_near_to_float_as_rounding_allows(backend, tmp_path):
    _, separate = quantized("", f'backend = "{backend}"')
    plan, joined = quantized(NAMED["site"], f'backend = "{backend}"')
    assert (plan.boundaries, count(joined, "dequantize")) == (2, 1)
    expected = model()(IMAGES)
    assert sqnr_db(expected, joined(IMAGES)) > sqnr_db(expected, separate(IMAGES)) - 1
    qrecipe.save_quantized(joined, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", model())
    assert torch.equal(loaded(IMAGES), joined(IMAGES))


def count(graph_module, target):
    return sum(node.target == target for node in graph_module.graph.nodes)


def broken(change):
    def lower(reference, qconfigs):
        lower_ours(reference, qconfigs)
        change(reference)

    return patch("qrecipe.execution.fx.convert.lower_ours", lower)


def swap_scales(reference):
    products = [n for n in reference.graph.nodes if n.target is torch.ops.quantized.mul]
    x, sigmoid, _, zero_point = products[0].args
    products[0].args = x, sigmoid, 1.0, zero_point


def tanh_instead(reference):
    for node in reference.graph.nodes:
        if node.target is torch.sigmoid:
            node.target = torch.tanh


@pytest.mark.parametrize("change", [swap_scales, tanh_instead])
def test_the_audit_finds_a_product_that_is_wrong(change):
    with broken(change), pytest.raises(qrecipe.AuditError, match="QR411 the quantized kernel of"):
        quantized(NAMED["site"])


def test_the_audit_finds_a_silu_that_is_left_float():
    with (
        patch("qrecipe.execution.fx.convert.lower_ours"),
        pytest.raises(qrecipe.AuditError, match=r"QR410 act .*became float"),
    ):
        quantized(NAMED["site"])


def test_training_simulates_its_range():
    plan = recipe(NAMED["site"], head='phase = "qat"')
    compiled = qrecipe.compile(model(), plan, IMAGES)
    prepared = compiled.prepare().train()
    prepared(IMAGES).sum().backward()
    assert count(compiled.convert(prepared), "dequantize") == 1
