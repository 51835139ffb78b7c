"""What does nothing outside training has no site, costs no boundary and breaks no fusion."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plans import net_of, recipe, sites
from shares import every
from torch import nn
from torch.ao.quantization import DeQuantStub, QuantStub
from training import qat_recipe, trained

import qrecipe
from qrecipe.errors.findings import UnmatchedRuleError
from qrecipe.execution.fake_quants import stop_observing

ROWS = torch.rand(4, 6)
IMAGES = torch.rand(4, 2, 3, 6, generator=torch.Generator().manual_seed(0))


@torch.fx.wrap
def stochastic_depth(input, p, mode, training=True):
    """As a library's own function, which tracing does not look into."""
    return input * torch.rand(len(input), 1, 1, 1).gt(p) if training and p > 0 else input


@torch.fx.wrap
def drop_and_add(x, residual, training=True):
    return x + residual


class DropPath(nn.Module):
    def forward(self, x):
        return x * (torch.rand(len(x), 1, 1, 1) > 0.5) if self.training else x


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
    "float": lambda x: x.float(),
    "to": lambda x: x.to(device="cpu", dtype=torch.float32),
    "type_as": lambda x: x.type_as(x),
    "dtype of another": lambda x: x.to(x.dtype),
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
    compiled = qrecipe.compile(model, qat_recipe(), ROWS)
    assert [site.members for site in compiled.plan] == [("0", "3")]
    kinds = [type(module) for module in compiled.prepare().modules()]
    assert kinds.count(nn.Dropout) == 1


class Noisy(nn.Module):
    """Its training branch draws a number in Python."""

    def forward(self, x):
        if self.training and torch.rand(()) < 2:
            x = x * 1.1
        return x


DROPPING = {
    "dropout": nn.Dropout(inplace=True),
    "dropout2d": nn.Dropout2d(),
    "alpha": nn.AlphaDropout(),
    "feature alpha": nn.FeatureAlphaDropout(),
    "path": DropPath(),
    "branch on a random number": Noisy(),
    "F.dropout": net_of(lambda self, x: F.dropout(x, training=self.training)),
    "by keyword": net_of(lambda self, x: F.dropout2d(training=self.training, input=x)),
    "torch.alpha_dropout": net_of(lambda self, x: torch.alpha_dropout(x, 0.5, self.training)),
    "rate in training": net_of(lambda self, x: F.dropout(x, 0.5 if self.training else 0.0)),
    "stochastic depth": net_of(lambda self, x: stochastic_depth(x, 0.5, "row", self.training)),
}


@pytest.mark.parametrize("name", every(3, DROPPING))
def test_what_drops_in_training_drops_there_and_costs_nothing_afterwards(name, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), DROPPING[name], nn.Linear(6, 3)).eval()
    compiled, prepared = trained(model, [IMAGES], qat_recipe())
    assert [site.name for site in compiled.plan] == ["0", "3"]
    assert compiled.plan.boundaries == 2
    assert "QR205" not in [warning.code for warning in compiled.plan.warnings]
    stop_observing(prepared)
    assert not torch.equal(prepared.train()(IMAGES), prepared.eval()(IMAGES))
    converted = compiled.convert(prepared)
    assert sum(node.target is torch.quantize_per_tensor for node in converted.graph.nodes) == 1
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", model)
    assert torch.equal(loaded(IMAGES), converted(IMAGES))


PLACES = {
    "after the input": lambda self, x: self.b(self.a(self.drop(x))),
    "twice": lambda self, x: self.b(self.drop(self.drop(self.a(x)))),
    "beside a reader": lambda self, x: self.b((y := self.a(x)) + self.drop(y)),
    "before a float reader": lambda self, x: self.b(self.drop(y := self.a(x))) + y.sin()[..., :3],
    "for a float reader": lambda self, x: self.b(y := self.drop(self.a(x))) + y.sin()[..., :3],
    "after a float operation": lambda self, x: self.b(self.drop(self.a(x).sin())),
    "at the end": lambda self, x: self.drop(self.b(self.a(x))),
    "in a branch": lambda self, x: self.b(x + self.drop(self.a(x))),
}


@pytest.mark.parametrize("place", every(3, PLACES))
def test_a_trained_model_with_dropouts_has_the_boundaries_of_one_without(place):
    torch.manual_seed(0)
    layers = {"a": nn.Linear(6, 6), "b": nn.Linear(6, 3)}
    found = []
    for drop in (nn.Dropout2d(0.1), nn.Identity()):
        model = net_of(PLACES[place], drop=drop, **layers)
        compiled, prepared = trained(model, [IMAGES], qat_recipe())
        converted = compiled.convert(prepared)
        targets = [node.target for node in converted.graph.nodes]
        found.append((compiled.plan.boundaries, targets))
    with_dropout, without = found
    assert with_dropout == without


def test_the_range_of_a_trained_model_is_that_of_what_a_dropout_reads():
    model = net_of(lambda self, x: self.fc(self.drop(x)), drop=nn.Dropout(), fc=nn.Linear(6, 3))
    compiled, prepared = trained(model, [torch.ones(64, 6)] * 3, qat_recipe())
    converted = compiled.convert(prepared)
    (quantize,) = (n for n in converted.graph.nodes if n.target is torch.quantize_per_tensor)
    scale = getattr(converted, quantize.args[1].target)
    assert 1 / 256 < float(scale) < 1.1 / 127


@pytest.mark.parametrize("name", every(4, MODULES))
def test_what_does_nothing_has_no_site_in_eager_mode(name):
    def forward(self, x):
        x = self.nothing(self.a(x))
        return self.b(x if x.sum() < 1e6 else -x)

    modules = {"a": nn.Linear(6, 6), "nothing": MODULES[name], "b": nn.Linear(6, 3)}
    model = net_of(forward, **modules)
    plan = qrecipe.plan(model, recipe(base="builtin:x86-dynamic"), ROWS)
    assert plan.executor == "eager"
    assert list(sites(plan)) == ["a", "b"]
    rule = '[rules.module_name]\n"nothing" = "float"'
    with pytest.raises(UnmatchedRuleError, match="names nothing, which does nothing"):
        qrecipe.plan(model, recipe(rule, base="builtin:x86-dynamic"), ROWS)


def test_in_eager_mode_what_only_sometimes_returns_its_input_is_a_site():
    def forward(self, x):
        x = self.act(self.a(self.act(x)))
        return self.b(x if x.sum() < 1e6 else -x)

    class Positive(nn.Module):
        def forward(self, x):
            return x if (x >= 0).all() else x.relu()

    model = net_of(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 3), act=Positive())
    plan = qrecipe.plan(model, recipe(base="builtin:x86-dynamic"), ROWS)
    assert list(sites(plan)) == ["act", "a", "b"]


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
