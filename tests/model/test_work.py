"""The multiplications with weights that a call of a model needs, by which operations they are."""

from __future__ import annotations

import warnings

import pytest
import torch
from plans import net_of
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from qrecipe.model.call import Inputs
from qrecipe.model.work import work_of


def test_work_is_what_the_layers_multiply():
    model = net_of(
        lambda self, x: self.fc(self.lstm(self.conv(x))[0]),
        conv=nn.Conv1d(5, 5, 3, padding=1),
        lstm=nn.LSTM(6, 8, batch_first=True),
        fc=nn.Linear(8, 3),
    )
    work = work_of(model, Inputs.from_batch(torch.randn(2, 5, 6)))
    assert work.convolutions == 2 * 6 * 5 * 5 * 3
    assert work.products == 2 * 5 * (4 * 8 * (6 + 8) + 8 * 3)


def counted(model, *inputs):
    work = work_of(model.eval(), Inputs(inputs))
    return work.convolutions, work.products


TOKENS = torch.rand(2, 5, 8)
PROJECTIONS = 4 * 8 * 8 * TOKENS[..., 0].numel()


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_attention_is_counted_by_its_projections(batch_first):
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    assert counted(attention, TOKENS, TOKENS, TOKENS) == (0, PROJECTIONS)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, activation="gelu")
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert counted(encoder, TOKENS) == (0, 2 * (PROJECTIONS + 2 * 8 * 16 * 10))
    assert torch.backends.mha.get_fastpath_enabled()


def test_products_of_functions_with_a_weight_are_counted_and_those_of_activations_are_not():
    weight = nn.Parameter(torch.randn(8, 3))
    doubled = net_of(lambda self, x: torch.einsum("btc,ck->btk", x, 2 * weight))
    assert counted(doubled, TOKENS) == (0, 10 * 8 * 3)
    batched = net_of(lambda self, x: torch.bmm(x, weight.expand(2, 8, 3)))
    assert counted(batched, TOKENS) == (0, 10 * 8 * 3)
    assert counted(net_of(lambda self, x: x @ x.transpose(1, 2)), TOKENS) == (0, 0)
    assert counted(nn.Bilinear(8, 8, 3), TOKENS, TOKENS) == (0, 10 * 8 * 8 * 3)


def test_strided_grouped_and_transposed_convolutions_are_counted():
    x = torch.rand(1, 4, 8, 8)
    assert counted(nn.Conv2d(4, 4, 2, stride=2, groups=4), x) == (4 * 16 * 4, 0)
    assert counted(nn.ConvTranspose2d(4, 6, 3), x) == (4 * 6 * 9 * 64, 0)


def test_operations_that_are_called_with_names_are_counted():
    weight = torch.randn(4, 3, 3, 3)

    def forward(self, x):
        pair, none = [1, 1], [0, 0]
        return torch.ops.aten.convolution(
            x, weight, bias=None, stride=pair, padding=none, dilation=pair,
            transposed=False, output_padding=none, groups=1,
        )  # fmt: skip

    assert counted(net_of(forward), torch.rand(1, 3, 8, 8)) == (4 * 36 * 27, 0)
    into = net_of(lambda self, x: torch.mm(x, self.weight, out=torch.empty(2, 3)))
    into.weight = torch.randn(8, 3)
    assert counted(into, TOKENS[:, 0]) == (0, 2 * 8 * 3)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_a_linear_layer_on_nested_tensors_is_counted(layout):
    def forward(self, a, b):
        return self.fc(torch.nested.nested_tensor([a, b], layout=layout)).to_padded_tensor(0.0)

    model = net_of(forward, fc=nn.Linear(8, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nested tensors are a prototype
        assert work_of(model, Inputs((torch.rand(3, 8), torch.rand(5, 8)))).products == 8 * 8 * 4


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_counted_as_much_packed_as_padded(kind):
    padded, lengths = torch.rand(3, 5, 6), torch.tensor([5, 5, 5])
    gates = {nn.LSTM: 4, nn.GRU: 3}[kind]
    layer = kind(6, 8, batch_first=True)
    packed = pack_padded_sequence(padded, lengths, batch_first=True)
    expected = (0, 15 * gates * 8 * (6 + 8))
    assert counted(layer, padded) == counted(layer, packed) == expected


def test_inside_inference_mode_the_same_is_counted():
    net = nn.Sequential(nn.Conv1d(5, 4, 1), nn.Linear(8, 3))
    with torch.inference_mode():
        assert counted(net, TOKENS) == (2 * 8 * 4 * 5, 2 * 4 * 8 * 3)
