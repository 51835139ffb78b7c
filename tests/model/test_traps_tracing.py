"""What tracing and state cost in torch's FX graph mode, and what becomes of it: docs/traps.md."""

from __future__ import annotations

import copy

import plain_torch as plain
import pytest
import torch
from plain_torch import everything, observed, silence
from plans import net_of, recipe, sites
from runs import HEAD, STATIC, silent
from torch import nn
from torch.ao.quantization.fx.custom_config import ConvertCustomConfig, PrepareCustomConfig
from torch.fx.proxy import TraceError as TorchTraceError

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import PlanError, QRecipeWarning, TraceError, UnmatchedRuleError

ROWS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [ROWS] * 10


def linear(forward=lambda self, x: self.fc(x), **modules):
    torch.manual_seed(0)
    return net_of(forward, fc=nn.Linear(6, 6), **modules)


def quantized(model, a_recipe=STATIC, x=ROWS):
    return qrecipe.quantize(model, a_recipe, [x] * 10, progress=silent)


def _loops(self, x):
    for _ in range(x.shape[0]):
        x = self.fc(x)
    return x


def _takes_a_tensor_only(self, x):
    if not isinstance(x, torch.Tensor):
        raise TypeError("need a tensor")
    return self.fc(x)


UNTRACEABLE = {
    "branch": lambda self, x: self.fc(x) if x.sum() > 0 else x,
    "length": lambda self, x: self.fc(x) * len(x),
    "range": _loops,
    "isinstance": _takes_a_tensor_only,
    "star": lambda self, x: torch.cat([self.fc(row) for row in x]),
}


@pytest.mark.parametrize("kind", UNTRACEABLE)
def test_torch_does_not_say_where_tracing_fails_and_here_the_module_and_the_line_are_named(kind):
    inner = linear(UNTRACEABLE[kind])
    model = linear(lambda self, x: self.inner(self.fc(x)), inner=inner)
    with pytest.raises((TorchTraceError, TypeError, RuntimeError)) as theirs:
        observed(model, everything(), ROWS)
    assert "inner" not in str(theirs.value)
    with pytest.raises(TraceError) as ours:
        qrecipe.plan(model, STATIC, ROWS)
    (finding,) = ours.value.findings
    assert '"inner"' in finding.message
    assert "test_traps_tracing.py:" in finding.message
    mended = qrecipe.parse_recipe(
        f"{HEAD}{finding.hint[finding.hint.index('[fx]') :]}".replace("[fx] ", "[fx]\n")
    )
    assert sites(qrecipe.plan(model, mended, ROWS))["inner"].verdict == "float"


def test_arguments_that_are_iterated_fail_somewhere_in_torch_and_here_by_their_name():
    class Sum(nn.Module):
        def forward(self, *tensors):
            return sum(tensor for tensor in tensors)

    with pytest.raises(TorchTraceError):
        observed(Sum().eval(), everything(), ROWS)
    with pytest.raises(TraceError):
        qrecipe.plan(Sum().eval(), STATIC, ROWS)

    class First(nn.Module):
        def forward(self, *tensors):
            return tensors[0] * 2

    with pytest.raises(TraceError, match=r"takes \*tensors"):
        qrecipe.plan(First().eval(), STATIC, ROWS)


def test_torch_cannot_branch_on_an_optional_argument_that_is_given_and_here_none_is_a_constant():
    """`forward(x, y=None)` traces here with what the example inputs leave out."""

    def forward(self, x, scale=None):
        if scale is not None:
            x = x * float(scale)
        return self.fc(x)

    model = linear(forward)
    with pytest.raises((TorchTraceError, TypeError)):
        observed(model, everything(), ROWS)
    assert sites(qrecipe.plan(model, STATIC, ROWS))["fc"].verdict == "quantized"


def test_torch_bakes_in_the_training_branch_and_here_the_eval_branch_is_traced_with_a_warning():
    model = linear(lambda self, x: self.fc(x) if self.training else self.fc(x) * 0.5).train()
    with silence():
        theirs = plain.converted(copy.deepcopy(model), everything(), ROWS).eval()
    deployed = copy.deepcopy(model).eval()
    assert sqnr_db(deployed(ROWS), theirs(ROWS)) < 5
    with pytest.warns(QRecipeWarning, match="QR202"):
        ours = quantized(model)
    assert sqnr_db(deployed(ROWS), ours(ROWS)) > 25
    assert model.training


def test_a_view_behind_a_convolution_fails_in_torch_when_it_runs_and_here_it_is_a_reshape():
    model = net_of(lambda self, x: self.conv(x).view(x.shape[0], -1), conv=nn.Conv2d(3, 4, 3))
    with silence():
        theirs = plain.converted(model, everything(), IMAGE)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        theirs(IMAGE)
    assert sqnr_db(model(IMAGE), quantized(model, x=IMAGE)(IMAGE)) > 25


def test_torch_is_silent_about_the_float_inside_of_a_non_traceable_module_and_the_plan_says_it():
    model = linear(lambda self, x: self.fc(self.inner(x)), inner=linear())
    custom = PrepareCustomConfig().set_non_traceable_module_names(["inner"])
    with silence():
        theirs = plain.calibrated(model, everything(), ROWS, prepare_custom_config=custom)
        theirs = plain.convert_fx(theirs)
    assert type(theirs.inner.fc) is nn.Linear
    closed = recipe('[fx]\nnon_traceable_module_name = ["inner"]')
    plan = qrecipe.plan(model, closed, ROWS)
    assert [(site.name, site.verdict) for site in plan.sites] == [
        ("inner", "float"),
        ("fc", "quantized"),
    ]
    assert "no quantized kernel" in sites(plan)["inner"].reason
    assert type(quantized(model, closed).inner.fc) is nn.Linear


def test_torch_calibrates_a_model_in_training_mode_with_dropout_and_here_a_copy_is_in_eval_mode():
    model = linear(lambda self, x: self.drop(self.fc(x)), drop=nn.Dropout(0.5)).train()
    with silence():
        theirs = plain.prepared(model, everything(), ROWS)
    assert not torch.equal(theirs(ROWS), theirs(ROWS))
    normed = net_of(lambda self, x: self.bn(self.conv(x)), conv=nn.Conv2d(3, 4, 1))
    normed.bn = nn.BatchNorm2d(4)
    with pytest.raises(AssertionError):
        plain.prepared(normed.train(), everything(), IMAGE)
    for each, x in ((model, ROWS), (normed, IMAGE)):
        with pytest.warns(QRecipeWarning, match="QR202"):
            prepared = qrecipe.compile(each, STATIC, x).prepare()
        assert torch.equal(prepared(x), prepared(x))
        assert each.training


def test_torch_spoils_the_prepared_model_by_converting_and_here_it_converts_twice_alike():
    observing = plain.calibrated(linear(), everything(), ROWS)
    before = [node.name for node in observing.graph.nodes]
    plain.convert_fx(observing)
    assert [node.name for node in observing.graph.nodes] != before
    compiled = qrecipe.compile(linear(), STATIC, ROWS)
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, BATCHES, progress=silent)
    expected = prepared(ROWS)
    once, again = compiled.convert(prepared), compiled.convert(prepared)
    assert torch.equal(once(ROWS), again(ROWS))
    assert torch.equal(prepared(ROWS), expected)
    assert any("activation_post_process" in name for name, _ in prepared.named_modules())


def test_torchs_prepared_model_shares_the_callers_parameters_and_ours_shares_nothing():
    model = linear(lambda self, x: self.gelu(self.fc(x)) * self.shift, gelu=nn.GELU())
    model.shift = nn.Parameter(torch.ones(6))
    theirs = plain.calibrated(model, everything(), ROWS)
    assert theirs.fc.weight.data_ptr() == model.fc.weight.data_ptr()
    theirs = plain.convert_fx(theirs)
    assert theirs.shift.data_ptr() == model.shift.data_ptr()
    compiled = qrecipe.compile(model, STATIC, ROWS)
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, BATCHES, progress=silent)
    calibrated, expected = prepared(ROWS), compiled.convert(prepared)(ROWS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert torch.equal(prepared(ROWS), calibrated)
    assert torch.equal(compiled.convert(prepared)(ROWS), expected)
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.zero_()
    assert all(bool((parameter == 7.0).all()) for parameter in model.parameters())


def test_torch_loses_preserved_attributes_and_misspelt_ones_and_here_both_are_seen_to():
    model = linear()
    model.labels = ["a", "b"]
    keep = PrepareCustomConfig().set_preserved_attributes(["labels"])
    typo = PrepareCustomConfig().set_preserved_attributes(["labls"])
    with silence():
        observing = plain.calibrated(model, everything(), ROWS, prepare_custom_config=keep)
        assert observing.labels == ["a", "b"]
        assert not hasattr(plain.convert_fx(copy.deepcopy(observing)), "labels")
        also = ConvertCustomConfig().set_preserved_attributes(["labels"])
        assert plain.convert_fx(observing, convert_custom_config=also).labels == ["a", "b"]
        plain.prepared(model, everything(), ROWS, prepare_custom_config=typo)
    kept = quantized(model, recipe('[fx]\npreserved_attributes = ["labels"]'))
    assert kept.labels == ["a", "b"]
    with pytest.raises(UnmatchedRuleError, match="labels"):
        qrecipe.plan(model, recipe('[fx]\npreserved_attributes = ["labls"]'), ROWS)


def test_torch_never_looks_at_the_example_inputs_and_here_the_model_is_run_on_them():
    with silence():
        assert observed(linear(), everything(), "garbage") == {"fc"}
    for inputs in ("garbage", torch.zeros(2, 5)):
        with pytest.raises(PlanError) as caught:
            qrecipe.plan(linear(), STATIC, inputs)
        assert caught.value.findings[0].code == "QR307"
