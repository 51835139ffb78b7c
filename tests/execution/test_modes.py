"""Other engines, dynamic and weight-only quantization, attributes, odd outputs."""

from __future__ import annotations

import pytest
import torch
from artifacts import recipe
from nets import NETS
from runs import HEAD, STATIC, silent, tensors_of
from shares import every
from torch import nn
from torch.ao.nn import quantized as nnq

import qrecipe
from qrecipe.audit.sqnr import sqnr_db

# --- other engines and modes


@pytest.mark.parametrize("backend", ["fbgemm", "onednn", "qnnpack"])
@pytest.mark.parametrize("name", every(4, ["residual", "squeeze_excite", "decoder", "shared_conv"]))
def test_other_engines_pass_the_audit_and_leave_the_engine_as_it_was(backend, name):
    if backend not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch has no {backend}")
    net = NETS[name]
    batches = net.batches()
    recipe = qrecipe.parse_recipe(f'{HEAD}backend = "{backend}"\n')
    former = torch.backends.quantized.engine
    converted = qrecipe.quantize(net.model(), recipe, batches, progress=silent)
    assert torch.backends.quantized.engine == former
    assert sqnr_db(net.model()(batches[0]), converted(batches[0])) > 20


@pytest.mark.parametrize(
    ("name", "rule", "kind"),
    [
        ("mlp", '"torch.nn.Linear" = "dynamic"', nnq.dynamic.Linear),
        ("mlp", '"torch.nn.Linear" = "half"', nnq.dynamic.Linear),
        ("recurrent", '"torch.nn.LSTM" = "dynamic"', nnq.dynamic.LSTM),
        ("tagger", '"torch.nn.Embedding" = "embedding"', nnq.Embedding),
    ],
)
def test_dynamic_and_weight_only_sites_need_no_batches(name, rule, kind):
    net = NETS[name]
    batch = net.batches(1)[0]
    rules = f'[rules]\nglobal = "float"\n[rules.module_type]\n{rule}'
    converted = qrecipe.quantize(net.model(), recipe(rules), example_inputs=batch)
    assert sum(isinstance(module, kind) for module in converted.modules()) >= 1
    expected = tensors_of(net.model()(batch))[0]
    assert sqnr_db(expected, tensors_of(converted(batch))[0]) > 20


def test_all_float_gives_the_float_model_back():
    net = NETS["residual"]
    recipe = qrecipe.parse_recipe(f'{HEAD}[rules]\nglobal = "float"\n')
    converted = qrecipe.quantize(net.model(), recipe, example_inputs=net.batches(1)[0])
    batch = net.batches()[1]
    torch.testing.assert_close(converted(batch), net.model()(batch))


def test_preserved_attributes_survive_prepare_and_convert():
    net = NETS["mlp"]
    model = net.model()
    model.class_names = ["cat", "dog"]
    recipe = qrecipe.parse_recipe(f'{HEAD}[fx]\npreserved_attributes = ["class_names"]\n')
    compiled = qrecipe.compile(model, recipe, net.batches(1)[0])
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, net.batches(), progress=silent)
    assert prepared.class_names == ["cat", "dog"]
    assert compiled.convert(prepared).class_names == ["cat", "dog"]


def test_indices_as_output_are_no_reason_to_doubt_the_numbers():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x):
            return self.fc(x).argmax(1)

    batches = NETS["mlp"].batches()
    model = Classifier().eval()
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    assert converted(batches[0]).dtype == torch.int64


def test_a_conv_whose_output_is_also_read_before_the_relu_is_right():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.relu = nn.ReLU()

        def forward(self, x):
            y = self.conv(x)
            return y + self.relu(y)

    batches = NETS["residual"].batches()
    model = Branch().eval()
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    assert sqnr_db(model(batches[0]), converted(batches[0])) > 30
