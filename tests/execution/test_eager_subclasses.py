"""Layers of the caller's own in eager mode: encoder layers, and subclasses of linear ones."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from plans import net_of, verdicts
from shares import every
from torch import nn
from torch.ao.nn import quantized as nnq

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import (
    AuditError,
    QRecipeWarning,
    TraceError,
    UnsupportedError,
)

DYNAMIC = "builtin:x86-dynamic"

# --- torch's encoder layers have a fast path, which reads weights and takes no part in hooks


class OwnLayer(nn.TransformerEncoderLayer):
    """The fast path does not call its block, so it cannot be opened."""

    def _sa_block(self, *args, **kwargs):
        return super()._sa_block(*args, **kwargs) * 2


class CallsTorchs(nn.TransformerEncoderLayer):
    """Its weights are others once it is opened."""

    def forward(self, x):
        return super().forward(x) * self.self_attn.in_proj_weight.dim()


class OwnForward(nn.TransformerEncoderLayer):
    def forward(self, x):
        return x if x.sum() > 1e9 else self.linear2(torch.relu(self.linear1(x)))


class Around(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(8, 4)

    def forward(self, x):
        return x if x.sum() > 1e9 else self.head(self.layer(x))


def around(kind, **settings):
    torch.manual_seed(0)
    return Around(kind(8, 2, 16, **settings)).eval()


SEQUENCE = torch.randn(2, 3, 8)


@pytest.mark.filterwarnings("ignore:.*QR2")
@pytest.mark.parametrize("a_recipe", every(2, ["builtin:x86-dynamic", "builtin:float16-dynamic"]))
@pytest.mark.parametrize("kind", [OwnLayer, CallsTorchs])
def test_an_encoder_layer_with_code_of_its_own_stays_whole(kind, a_recipe, tmp_path):
    model = around(kind, batch_first=True)
    plan = qrecipe.plan(model, a_recipe, SEQUENCE)
    assert verdicts(plan) == {"layer": "float", "head": "quantized"}
    converted = qrecipe.quantize(model, a_recipe, [SEQUENCE])
    qrecipe.save_quantized(converted, tmp_path / "q.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "q.safetensors", model)
    with torch.no_grad():
        for quantized in (converted, loaded):
            assert output_sqnr_db(model(SEQUENCE), quantized(SEQUENCE)) > 30
    assert len(qrecipe.sensitivity(model, a_recipe, [SEQUENCE]).sites) == 1


def test_a_block_that_the_fast_path_leaves_out_is_named_with_a_cure_that_works():
    model = around(OwnLayer, batch_first=True)
    with pytest.warns(QRecipeWarning, match="leaves out its own _sa_block, and so does this"):
        qrecipe.plan(model, DYNAMIC, SEQUENCE)
    traced = nn.Sequential(model.layer, model.head).eval()
    with pytest.raises(TraceError, match=r'"0" is not opened: .*leaves out its own _sa_block'):
        qrecipe.plan(traced, "builtin:x86-static", SEQUENCE)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        plan = qrecipe.plan(traced, "builtin:x86-static", SEQUENCE)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert plan["0.linear1"].verdict == "quantized"


@pytest.mark.filterwarnings("ignore:.*QR2")
def test_a_layer_inside_vmap_stays_float_with_the_reason():
    inner, head = nn.Linear(8, 8), nn.Linear(8, 4)
    model = net_of(lambda self, x: self.head(torch.vmap(self.inner)(x)), inner=inner, head=head)
    with pytest.raises(UnsupportedError, match="such as vmap, which would run"):
        qrecipe.plan(model, DYNAMIC, SEQUENCE)
    with pytest.raises(TraceError, match=r"torch\.vmap and the other transforms"):
        qrecipe.plan(model, "builtin:x86-static", SEQUENCE)
    converted = qrecipe.quantize(model, qrecipe.suggest(model, SEQUENCE), [SEQUENCE])
    assert type(converted.head) is nnq.dynamic.Linear
    assert type(converted.inner) is nn.Linear
    assert output_sqnr_db(model(SEQUENCE), converted(SEQUENCE)) > 30


def test_next_to_nothing_is_left_of_it_and_that_is_said():
    for kind in (OwnLayer, CallsTorchs):
        with pytest.warns(QRecipeWarning, match=r"(?s)QR221 only .*layer \(.*one operation"):
            qrecipe.plan(around(kind, batch_first=True), DYNAMIC, SEQUENCE)


def test_it_stays_whole_where_these_inputs_would_take_the_slow_path():
    """One sequence alone takes the slow path, and a batch of them would fail later."""
    model = around(nn.TransformerEncoderLayer, batch_first=True)
    model.layer.register_forward_hook(lambda module, args, output: None)
    with pytest.warns(QRecipeWarning, match="QR221"):
        assert verdicts(qrecipe.plan(model, DYNAMIC, SEQUENCE[0]))["layer"] == "float"


def test_one_with_a_forward_that_calls_its_layers_is_quantized_inside():
    model = around(OwnForward)
    converted = qrecipe.quantize(model, DYNAMIC, [SEQUENCE])
    assert type(converted.layer.linear1) is nnq.dynamic.Linear
    with torch.no_grad():
        assert output_sqnr_db(model(SEQUENCE), converted(SEQUENCE)) > 30


def test_as_the_whole_model_it_is_refused():
    model = OwnLayer(8, 2, 16, batch_first=True).eval()
    with pytest.raises(TraceError, match=r"(?s)QR305 .*torch runs it as one operation"):
        qrecipe.quantize(model, DYNAMIC, [SEQUENCE])


class ReadsUnlessHooked(nn.Module):
    """As torch's encoder layers do."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        if self.fc._forward_hooks or self.fc._forward_pre_hooks:
            return self.fc(x)
        return F.linear(x, self.fc.weight, self.fc.bias)


def test_what_is_called_only_under_hooks_stays_float():
    plan = qrecipe.plan(Around(ReadsUnlessHooked()).eval(), DYNAMIC, SEQUENCE)
    assert verdicts(plan) == {"head": "quantized"}
    assert "not reached by the example inputs, and so left float: layer.fc" in str(plan)


class Reads(nn.Module):
    """Takes what torch's fast path reads from a layer only where nothing watches the calls."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        y = self.fc(x)
        is_watched = self.fc._forward_hooks or self.fc._forward_pre_hooks
        return y if is_watched else y + self.fc.weight.sum()


def test_the_audit_runs_what_is_returned_and_names_the_module_that_fails():
    with pytest.raises(AuditError, match=r"QR413 .* on the first batch in layer: 'function'"):
        qrecipe.quantize(Around(Reads()).eval(), DYNAMIC, [SEQUENCE])
    with pytest.raises(AuditError, match="QR413"):
        qrecipe.sensitivity(Around(Reads()).eval(), DYNAMIC, [SEQUENCE])


class Renamed(nn.Linear):
    pass


class Written(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.scale = 1.0

    def reset_parameters(self):
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input):
        return F.linear(weight=self.weight, input=input.flatten(1), bias=self.bias)


class Doubled(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


OWN_LINEAR = {
    "renamed": (Renamed, "quantized"),
    "written": (Written, "quantized"),
    "without bias": (partial(Renamed, bias=False), "quantized"),
    "torch's own": (nn.modules.linear.NonDynamicallyQuantizableLinear, "quantized"),
    "doubled": (Doubled, "float"),
}


@pytest.mark.parametrize("case", every(2, OWN_LINEAR))
def test_a_subclass_that_computes_what_a_linear_layer_does_is_one(case, tmp_path):
    torch.manual_seed(0)
    kind, verdict = OWN_LINEAR[case]
    model = net_of(
        lambda self, x: self.b(self.a(x)) if x.sum() < 1e9 else x,
        a=kind(8, 8),
        b=nn.Linear(8, 3),
    )
    x = torch.rand(4, 8)
    plan = qrecipe.plan(model, DYNAMIC, x)
    assert plan.executor == "eager"
    assert verdicts(plan) == {"a": verdict, "b": "quantized"}
    converted = qrecipe.quantize(model, DYNAMIC, example_inputs=x)
    assert output_sqnr_db(model(x), converted(x)) > 30
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", model)
    assert torch.equal(loaded(x), converted(x))


def test_in_an_attention_that_stays_whole_nothing_becomes_a_linear_layer():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    attention.register_forward_hook(lambda module, args, output: None)
    model = net_of(
        lambda self, x: self.b(self.a(x, x, x)[0]) if x.sum() < 1e9 else x,
        a=attention,
        b=Renamed(8, 3),
    )
    plan = qrecipe.plan(model, DYNAMIC, torch.rand(2, 4, 8))
    assert plan.executor == "eager"
    assert verdicts(plan) == {"a": "float", "b": "quantized"}
