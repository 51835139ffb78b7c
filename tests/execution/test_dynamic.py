"""Dynamic and weight-only quantization: what is lowered, what is not and why, and mixed recipes."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import NETS
from plans import net_of, sites
from runs import silent, tensors_of
from torch import nn
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic.quantized import dynamic as fused

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import AuditError, UnsupportedError
from qrecipe.model.call import Inputs

HEAD = """
format = 1
backend = "{backend}"
[tensor.weight]
observer = "per_channel_minmax"
dtype = "int8"
qscheme = "per_channel_symmetric"
[tensor.activation]
dtype = "uint8"
is_dynamic = true
[tensor.half]
dtype = "float16"
[tensor.half-dynamic]
dtype = "float16"
is_dynamic = true
[tensor.embedding]
observer = "per_channel_minmax"
dtype = "uint8"
qscheme = "per_channel_affine_float_qparams"
[tensor.embedding-4-bit]
observer = "per_channel_minmax"
dtype = "uint4"
qscheme = "per_channel_affine_float_qparams"
[qconfig]
int8-dynamic = {{ weight = "weight", activation = "activation" }}
float16 = {{ weight = "half", activation = "half-dynamic" }}
embedding = {{ weight = "embedding" }}
embedding-4-bit = {{ weight = "embedding-4-bit" }}
[rules]
"""


def recipe(says, backend="x86"):
    """One qconfig for everything."""
    return qrecipe.parse_recipe(HEAD.format(backend=backend) + f'global = "{says}"\n')


def _first(module):
    return net_of(lambda self, x: self.m(x)[0], m=module)


def _alone(module):
    return net_of(lambda self, x: self.m(x), m=module)


class FunctionalLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return F.relu(F.linear(x, self.weight, self.bias))


_RANDOM = torch.Generator().manual_seed(0)
ROWS = torch.randn(4, 8, generator=_RANDOM)
STEPS = torch.randn(5, 4, 8, generator=_RANDOM)
DYNAMIC = {
    "Linear": (lambda: _alone(nn.Linear(8, 4)), ROWS, nnq.dynamic.Linear),
    "Linear+ReLU": (
        lambda: _alone(nn.Sequential(nn.Linear(8, 4), nn.ReLU())),
        ROWS,
        fused.LinearReLU,
    ),
    "LSTM": (lambda: _first(nn.LSTM(8, 8, 2, bidirectional=True)), STEPS, nnq.dynamic.LSTM),
    "GRU": (lambda: _first(nn.GRU(8, 8)), STEPS, nnq.dynamic.GRU),
    "LSTMCell": (lambda: _first(nn.LSTMCell(8, 8)), ROWS, nnq.dynamic.LSTMCell),
    "GRUCell": (lambda: _alone(nn.GRUCell(8, 8)), ROWS, nnq.dynamic.GRUCell),
    "RNNCell": (lambda: _alone(nn.RNNCell(8, 8)), ROWS, nnq.dynamic.RNNCell),
}


def _weights(module):
    """The dtypes of all packed weights inside a dynamic module."""
    found = str(module.state_dict()) + str([m.__dict__ for m in module.modules()])
    return {word for word in ("qint8", "float16") if f"torch.{word}" in found}


@pytest.mark.parametrize(("says", "dtype"), [("int8-dynamic", "qint8"), ("float16", "float16")])
@pytest.mark.parametrize("kind", DYNAMIC)
def test_a_module_becomes_dynamic_in_int8_and_in_float16(kind, says, dtype):
    build, x, became = DYNAMIC[kind]
    model = build().eval()
    converted = qrecipe.quantize(model, recipe(says), example_inputs=x)
    (module,) = (m for m in converted.modules() if isinstance(m, became))
    assert dtype in _weights(module)
    least = 30 if dtype == "qint8" else 60
    assert least < output_sqnr_db(model(x), converted(x)) < 120


@pytest.mark.parametrize(("says", "dtype"), [("int8-dynamic", "qint8"), ("float16", "float16")])
def test_a_linear_function_becomes_dynamic_with_its_relu(says, dtype):
    model = FunctionalLinear().eval()
    converted = qrecipe.quantize(model, recipe(says), example_inputs=ROWS)
    (node,) = (each for each in converted.graph.nodes if each.op not in ("placeholder", "output"))
    layer = converted.get_submodule(node.target)
    assert type(layer) is fused.LinearReLU
    assert dtype in _weights(layer)
    assert output_sqnr_db(model(ROWS), converted(ROWS)) > 30


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "onednn", "qnnpack"])
def test_every_engine_runs_dynamic_int8_and_is_set_back(backend):
    net = NETS["cells"]
    former = torch.backends.quantized.engine
    batch = net.batches(1)[0]
    made = qrecipe.quantize(net.model(), recipe("int8-dynamic", backend), example_inputs=batch)
    assert torch.backends.quantized.engine == former
    assert output_sqnr_db(net.model()(batch), made(batch)) > 30
    dynamic = [m for m in made.modules() if ".quantized.dynamic." in type(m).__module__]
    assert len(dynamic) >= 5


def reason_at(model, a_recipe, x, name="m"):
    with pytest.raises(UnsupportedError) as caught:
        qrecipe.plan(model.eval(), a_recipe, x)
    return sites(caught.value.plan)[name].reason


@pytest.mark.parametrize("says", ["int8-dynamic", "float16"])
def test_a_whole_rnn_says_which_recurrent_modules_have_kernels(says):
    reason = reason_at(_first(nn.RNN(8, 8)), recipe(says), STEPS)
    assert reason == ("torch has quantized kernels for LSTM, GRU and cells, but not for RNN")
    rule = '[rules.module_type]\n"torch.nn.RNN" = "int8-dynamic"\n'
    named = qrecipe.parse_recipe(HEAD.format(backend="x86") + f'global = "float"\n{rule}')
    with pytest.raises(UnsupportedError, match=r'module_type "torch\.nn\.RNN"'):
        qrecipe.plan(_first(nn.RNN(8, 8)), named, STEPS)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.LSTM(8, 8, bias=False), "without bias"),
        (nn.GRUCell(8, 8, bias=False), "without bias"),
        (nn.LSTM(8, 8, proj_size=4), "proj_size"),
    ],
)
def test_a_recurrent_module_that_torch_cannot_convert_says_why(module, why):
    build = _alone if isinstance(module, nn.GRUCell) else _first
    x = ROWS if isinstance(module, nn.GRUCell) else STEPS
    assert why in reason_at(build(module), recipe("int8-dynamic"), x)


def test_what_cannot_be_dynamic_or_weight_only_says_what_it_can_be():
    conv, image = _alone(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 8, 8)
    reason = reason_at(conv, recipe("int8-dynamic"), image)
    assert reason == "x86 has no dynamic kernel for Conv2d; it can be static"
    reason = reason_at(_alone(nn.Linear(8, 4)), recipe("embedding"), ROWS)
    assert reason == (
        "x86 has no weight-only kernel for Linear; it can be dynamic or static, "
        'or weight-only with executor = "pt2e"'
    )
    tokens = torch.randint(0, 9, (2, 3))
    reason = reason_at(_alone(nn.Embedding(9, 8)), recipe("int8-dynamic"), tokens)
    assert reason == "x86 has no dynamic kernel for Embedding; it can be weight-only"
    assert reason_at(_alone(nn.Linear(8, 4)), recipe("float16", "qnnpack"), ROWS) == (
        "qnnpack has no float16 kernels"
    )


# --- weight-only

TOKENS = torch.randint(0, 20, (4, 6), generator=_RANDOM)


@pytest.mark.parametrize(
    ("says", "dtype", "least"),
    [("embedding", torch.quint8, 40), ("embedding-4-bit", torch.quint4x2, 18)],
)
@pytest.mark.parametrize(
    ("module", "became"),
    [
        (nn.Embedding(20, 8), nnq.Embedding),
        (nn.Embedding(20, 8, padding_idx=0), nnq.Embedding),
        (nn.EmbeddingBag(20, 8, mode="sum"), nnq.EmbeddingBag),
    ],
)
def test_tables_are_stored_in_8_and_in_4_bits(module, became, says, dtype, least):
    model = _alone(module).eval()
    converted = qrecipe.quantize(model, recipe(says), example_inputs=TOKENS)
    assert type(converted.m) is became
    assert converted.m.weight().dtype == dtype
    assert least < output_sqnr_db(model(TOKENS), converted(TOKENS)) < 70


def test_torchs_bag_sums_whatever_its_mode_says_and_here_it_stays_float():
    model = _alone(nn.EmbeddingBag(20, 8, mode="mean")).eval()
    model.m.qconfig = torch.ao.quantization.float_qparams_weight_only_qconfig
    kernel = nnq.EmbeddingBag.from_float(model.m)
    assert output_sqnr_db(model(TOKENS), kernel(TOKENS)) < 0
    assert output_sqnr_db(model(TOKENS), kernel(TOKENS) / TOKENS.shape[1]) > 40
    del model.m.qconfig
    assert '"mean"' in reason_at(model, recipe("embedding"), TOKENS)


def test_torchs_bag_counts_the_row_of_padding_in_and_here_it_stays_float():
    model = _alone(nn.EmbeddingBag(20, 8, mode="sum", padding_idx=0)).eval()
    nn.init.normal_(model.m.weight)
    padded = torch.zeros(2, 3, dtype=torch.long)
    model.m.qconfig = torch.ao.quantization.float_qparams_weight_only_qconfig
    kernel = nnq.EmbeddingBag.from_float(model.m)
    assert not model(padded).any()
    assert kernel(padded).any()
    del model.m.qconfig
    assert "padding_idx" in reason_at(model, recipe("embedding"), TOKENS)


def test_rows_that_the_kernel_cannot_store_or_renormalise_stay_float():
    odd = _alone(nn.Embedding(20, 7))
    assert "4-bit weights share a byte" in reason_at(odd, recipe("embedding-4-bit"), TOKENS)
    assert qrecipe.quantize(odd.eval(), recipe("embedding"), example_inputs=TOKENS)
    normed = _alone(nn.Embedding(20, 8, max_norm=1.0))
    assert "max_norm" in reason_at(normed, recipe("embedding"), TOKENS)


# --- mixed, and the shipped recipes


def test_one_recipe_quantizes_a_cnn_statically_and_the_lstm_behind_it_dynamically():
    net = NETS["cnn_lstm"]
    batches = net.batches(12)
    model = net.model()
    converted = qrecipe.quantize(model, "builtin:cnn-lstm", batches, progress=silent)
    assert type(converted.conv) is torch.ao.nn.intrinsic.quantized.ConvReLU2d
    assert type(converted.lstm) is nnq.dynamic.LSTM
    assert type(converted.fc) is nnq.Linear
    assert output_sqnr_db(model(batches[0]), converted(batches[0])) > 25


def test_the_mode_of_a_layer_can_be_chosen_by_its_name():
    rule = '[rules.module_name]\n"fc" = "int8-dynamic"\n'
    text = f'format = 1\nextends = "builtin:cnn-lstm"\n{rule}'
    net = NETS["cnn_lstm"]
    plan = qrecipe.plan(net.model(), qrecipe.parse_recipe(text), net.batches(1)[0])
    modes = {name: site.mode for name, site in sites(plan).items()}
    assert (modes["conv"], modes["lstm"], modes["fc"]) == ("static", "dynamic", "dynamic")


@pytest.mark.parametrize(
    ("name", "net", "least"),
    [
        ("x86-dynamic", "cells", 30),
        ("x86-dynamic", "attention", 30),
        ("float16-dynamic", "cells", 60),
        ("embedding-weight-only", "tagger", 40),
    ],
)
def test_a_shipped_recipe_needs_no_batches_and_keeps_the_output(name, net, least):
    batch = NETS[net].batches(1)[0]
    model = NETS[net].model()
    converted = qrecipe.quantize(model, f"builtin:{name}", example_inputs=batch)
    call = Inputs.from_batch(batch).call
    assert output_sqnr_db(call(model), call(converted)) > least
    plan = qrecipe.plan(model, f"builtin:{name}", batch)
    assert {site.mode for site in plan.sites} <= {"dynamic", "weight_only", None}
    assert tensors_of(call(converted))[0].dtype == torch.float32


# --- the audit


@pytest.mark.parametrize("kind", ["Linear", "Linear+ReLU"])
def test_a_dynamic_kernel_that_is_a_tenth_off_is_found(kind, monkeypatch):
    build, x, became = DYNAMIC[kind]
    right = became.forward
    monkeypatch.setattr(became, "forward", lambda self, x: right(self, x) * 1.1)
    with pytest.raises(AuditError) as caught:
        qrecipe.quantize(build().eval(), recipe("int8-dynamic"), example_inputs=x)
    assert {finding.code for finding in caught.value.findings} == {"QR411"}


def test_weights_that_float16_cannot_hold_stay_float():
    model = _alone(nn.Linear(8, 4))
    with torch.no_grad():
        model.m.weight[0, 0] = 9e4
    assert "beyond 65504" in reason_at(model, recipe("float16"), ROWS)


def test_a_recipe_without_ranges_wants_no_more_batches():
    net = NETS["cells"]
    batch = net.batches(1)[0]
    qrecipe.quantize(net.model(), "builtin:x86-dynamic", [batch], progress=silent)


def test_a_float_join_before_a_dynamic_kernel_shares_no_scale():
    model = net_of(
        lambda self, x: self.b(torch.cat([self.a(x), 0.001 * x], 1)),
        a=nn.Linear(6, 6),
        b=nn.Linear(12, 3),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", qrecipe.QRecipeWarning)
        warnings.filterwarnings("ignore", ".*QR207")  # the net is small
        qrecipe.quantize(model, "builtin:x86-dynamic", [torch.rand(4, 6)])


def test_a_first_state_that_is_made_of_sizes_is_a_tensor():
    def forward(self, x):
        state = torch.zeros(1, x.size(0), 8)
        return self.out(self.rnn(x, (state, state))[0] + torch.ones(x.size(1), 1))

    model = net_of(forward, rnn=nn.LSTM(6, 8, batch_first=True), out=nn.Linear(8, 3))
    x = torch.rand(2, 5, 6)
    converted = qrecipe.quantize(model, "builtin:x86-dynamic", example_inputs=x)
    assert type(converted.rnn) is nnq.dynamic.LSTM
    for batch in (x, torch.rand(3, 4, 6)):
        assert output_sqnr_db(model(batch), converted(batch)) > 25
