"""What does nothing outside training has no site, costs no boundary and breaks no fusion."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plans import net_of, recipe, sites
from torch import nn
from torch.ao.quantization import DeQuantStub, QuantStub
from training import qat_recipe, trained

import qrecipe
from qrecipe.errors.findings import UnmatchedRuleError

ROWS = torch.rand(4, 6)


@torch.fx.wrap
def stochastic_depth(input, p, mode, training=True):
    """As a library's own function, which tracing does not look into."""
    return input * torch.rand(len(input), 1).gt(p) if training and p > 0 else input


@torch.fx.wrap
def drop_and_add(x, residual, training=True):
    return x + residual


class DropPath(nn.Module):
    def forward(self, x):
        return x * (torch.rand(len(x), 1) > 0.1) if self.training else x


MODULES = {
    "identity": nn.Identity(1, unused=True),
    "dropout": nn.Dropout(0.3, inplace=True),
    "dropout1d": nn.Dropout1d(),
    "alpha": nn.AlphaDropout(),
    "feature alpha": nn.FeatureAlphaDropout(),
    "path": DropPath(),
    "quantize": QuantStub(),
    "dequantize": DeQuantStub(),
    "empty": nn.Sequential(),
}
CALLS = {
    "F.dropout": lambda x: F.dropout(x, 0.3, False),
    "by keyword": lambda x: F.dropout(training=False, input=x),
    "in place": lambda x: F.dropout(x, training=False, inplace=True),
    "torch.dropout": lambda x: torch.dropout(x, p=0.3, train=False),
    "torch.feature_alpha_dropout_": lambda x: torch.feature_alpha_dropout_(x, 0.3, False),
    "rate 0": lambda x: F.dropout(x, 0.0),
    "stochastic depth": lambda x: stochastic_depth(x, 0.2, "row", False),
}


@pytest.mark.parametrize("name", [*MODULES, *CALLS])
def test_what_does_nothing_has_no_site_and_keeps_nothing_apart(name):
    nothing = MODULES[name] if name in MODULES else net_of(lambda self, x: CALLS[name](x))
    model = nn.Sequential(nn.Linear(6, 6), nothing, nn.ReLU(), nothing, nn.Linear(6, 3), nothing)
    plan = qrecipe.plan(model.eval(), recipe(), ROWS)
    assert [site.members for site in plan] == [("0", "2"), ("4",)]
    assert plan.boundaries == 2


def test_what_does_nothing_may_be_the_first_and_the_last_call_of_a_model():
    nothing = nn.Sequential(nn.Identity(), nn.Dropout())
    model = nn.Sequential(nothing, nn.Linear(6, 3), nothing).eval()
    converted = qrecipe.quantize(model, recipe(), [ROWS] * 10)
    bare = qrecipe.quantize(model[1:2].eval(), recipe(), [ROWS] * 10)
    assert torch.equal(converted(ROWS), bare(ROWS))


def test_a_function_that_does_more_than_dropping_stays():
    model = net_of(lambda self, x: drop_and_add(self.fc(x), x, training=False), fc=nn.Linear(6, 6))
    assert list(sites(qrecipe.plan(model, recipe(), ROWS))) == ["fc", ":drop_and_add"]


def test_a_dropout_with_a_hook_does_something():
    drop = nn.Dropout()
    drop.register_forward_hook(lambda module, args, output: output + 1)
    plan = qrecipe.plan(nn.Sequential(nn.Linear(6, 6), drop).eval(), recipe(), ROWS)
    assert "it has hooks" in plan["1"].reason


def test_in_training_only_what_never_drops_does_nothing():
    model = nn.Sequential(
        nn.Linear(6, 6), nn.Dropout(0.0), nn.Identity(), nn.ReLU(), nn.Dropout(0.5)
    ).eval()
    plan = qrecipe.plan(model, qat_recipe(), ROWS)
    assert [site.members for site in plan] == [("0", "3"), ("4",)]
    assert plan["4"].verdict == "passthrough"


def test_a_dropout_function_that_drops_in_training_is_stored_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = net_of(
        lambda self, x: self.b(F.dropout(self.a(x), training=self.training)),
        a=nn.Linear(6, 6),
        b=nn.Linear(6, 3),
    )
    compiled, prepared = trained(model, [ROWS], qat_recipe())
    converted = compiled.convert(prepared)
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", model)
    assert torch.equal(loaded(ROWS), converted(ROWS))


RULES = {
    '[rules.module_name]\n"drop" = "float"': "drop",
    '[rules.module_name]\n"d*" = "int8"': "drop",
    '[rules.module_name]\n":dropout" = "float"': ":dropout",
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_names_what_does_nothing_says_so(rule):
    model = net_of(
        lambda self, x: F.dropout(self.drop(self.fc(x)), training=False),
        fc=nn.Linear(6, 6),
        drop=nn.Dropout(),
    )
    with pytest.raises(UnmatchedRuleError) as caught:
        qrecipe.plan(model, recipe(rule), ROWS)
    (finding,) = caught.value.findings
    assert f"names {RULES[rule]}, which does nothing outside training" in finding.message
    key, _, value = rule.rpartition(" = ")
    optional = f"{key} = {{ qconfig = {value}, optional = true }}"
    plan = qrecipe.plan(model, recipe(optional), ROWS)
    assert list(sites(plan)) == ["fc"]
    assert "does nothing outside training" in plan.explain(RULES[rule])
