"""Sizes and latencies of models."""

from __future__ import annotations

import time

import pytest
import torch
from plans import net_of
from runs import STATIC, silent
from torch import nn
from torch.ao.nn.quantized import Conv2d, Embedding, Linear
from torch.ao.nn.quantized.dynamic import LSTM
from torch.ao.nn.quantized.dynamic import Linear as DynamicLinear

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db, sqnr_db
from qrecipe.measure.sizes import model_size
from qrecipe.measure.turns import Latency, compare_latency
from qrecipe.model.call import Inputs


def per_channel(rows: int, *rest: int) -> torch.Tensor:
    scales, zeros = torch.ones(rows, dtype=torch.double), torch.zeros(rows, dtype=torch.long)
    return torch.quantize_per_channel(torch.ones(rows, *rest), scales, zeros, 0, torch.qint8)


def test_float_model_is_its_parameters_and_buffers():
    assert model_size(nn.Linear(10, 5)) == (50 + 5) * 4
    assert model_size(nn.BatchNorm1d(3)) == 4 * 3 * 4 + 8


def test_shared_tensors_count_once():
    first, second = nn.Linear(10, 10), nn.Linear(10, 10)
    second.weight = first.weight
    assert model_size(nn.Sequential(first, second)) == (100 + 10 + 10) * 4


@pytest.mark.parametrize("kind", [Linear, DynamicLinear])
def test_quantized_linear_is_bytes_scales_and_bias(kind):
    linear = kind(16, 4)
    assert model_size(linear) == 16 * 4 + 4 * 4
    linear.set_weight_bias(per_channel(4, 16), torch.zeros(4))
    assert model_size(linear) == 16 * 4 + 4 * (8 + 8) + 4 * 4


def test_quantized_convolution_is_bytes_scales_and_bias():
    conv = Conv2d(3, 8, 3)
    conv.set_weight_bias(per_channel(8, 3, 3, 3), torch.zeros(8))
    assert model_size(conv) == 8 * 27 + 8 * (8 + 8) + 8 * 4
    conv.set_weight_bias(per_channel(8, 3, 3, 3), None)
    assert model_size(conv) == 8 * 27 + 8 * (8 + 8)


def test_float16_weights_count_two_bytes_though_torch_unpacks_them_as_float32():
    assert model_size(DynamicLinear(16, 4, dtype=torch.float16)) == 16 * 4 * 2 + 4 * 4


def test_quantized_embedding_counts_its_rows_and_their_float_parameters():
    embedding = Embedding(10, 8)
    assert model_size(embedding) == 10 * 8 + 10 * (4 + 4)


def test_quantized_lstm_counts_weights_inside_its_cells():
    lstm = LSTM(8, 8)
    weights, biases = 2 * 4 * 8 * 8, 2 * 4 * 8 * 4
    assert weights + biases <= model_size(lstm) <= weights + 2 * biases


def test_weight_packed_for_a_function_is_found_on_the_graph_module():
    model = nn.Module()
    model.packed = torch.ops.quantized.linear_prepack(per_channel(4, 16), None)
    assert model_size(model) == 16 * 4 + 4 * (8 + 8)


class _Busy(nn.Module):
    """Takes CPU time, which is what one thread is timed by."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        end = time.thread_time() + self.seconds
        while time.thread_time() < end:
            pass
        self.calls += 1
        return x


def test_latency_is_the_ratio_of_equally_many_runs_in_turns():
    slow, fast = _Busy(0.02), _Busy(0.005)
    latency = compare_latency(slow, fast, Inputs.from_batch(torch.ones(1)), budget=0.2)
    assert slow.calls == fast.calls
    assert 5 <= latency.runs < slow.calls
    assert 2 < latency.speed.median < 5
    assert latency.threads == torch.get_num_threads()


STEADY, LOADED = (1.0, 0.9, 1.1, 1.0, 1.0), (1.0, 9.0, 2.0, 1.0, 3.0)


@pytest.mark.parametrize(
    ("reference", "candidate", "is_slower", "text"),
    [
        (STEADY, (1.2, 1.3, 1.2, 1.4, 1.2), True, "0.83"),
        (STEADY, (1.0, 1.1, 1.2, 1.4, 0.9), False, "within noise"),
        (STEADY, (0.5, 0.5, 0.6, 9.0, 9.0), False, "within noise"),
        # in each pair by a fifth, whatever else the machine did
        (LOADED, (1.2, 10.8, 2.4, 1.2, 3.6), True, "0.83"),
        (LOADED, (0.8, 7.2, 1.6, 0.8, 2.4), False, "1.25"),
    ],
)
def test_slower_is_only_what_is_slower_beyond_noise(reference, candidate, is_slower, text):
    latency = Latency.of(reference, candidate)
    assert (latency.speed.is_slower, latency.speed.text) == (is_slower, text)
    assert (latency.candidate, latency.runs) == (sorted(candidate)[2], 5)


def test_infinities_that_both_have_are_equal():
    masked = torch.tensor([3.0, 4.0, -torch.inf])
    assert sqnr_db(masked, torch.tensor([3.0, 4.5, -torch.inf])) == pytest.approx(20.0)
    assert sqnr_db(masked, masked) == float("inf")
    assert sqnr_db(masked, torch.tensor([3.0, 4.0, torch.inf])) != float("inf")
    model = net_of(lambda self, x: self.fc(x).masked_fill(x > 1, -torch.inf), fc=nn.Linear(6, 6))
    batches = [torch.randn(4, 6) for _ in range(12)]
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    assert output_sqnr_db(model(batches[0]), converted(batches[0])) > 20
