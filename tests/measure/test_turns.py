"""What models are timed with, and what they are compared by."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import nn

from qrecipe.measure.latency import compare_latency
from qrecipe.measure.turns import Speed, clock
from qrecipe.model.call import Inputs


@pytest.fixture
def one_thread():
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


def test_with_one_thread_what_others_take_meanwhile_does_not_count(one_thread):
    now = clock()
    start = now()
    time.sleep(0.05)
    busy = threading.Thread(target=lambda: sum(range(200_000)))
    busy.start()
    busy.join()
    assert now() - start < 0.02


def test_with_several_threads_it_is_wall_time(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert clock() is time.perf_counter


class Counting(nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def forward(self, x):
        self.calls.append(self)
        return x


def test_each_model_is_called_right_before_it_is_timed():
    calls = []
    first, second = Counting(calls), Counting(calls)
    latency = compare_latency(first, second, Inputs.from_batch(torch.zeros(1)), budget=0.0)
    turns = calls[-4 * latency.runs :]
    assert turns == [first, first, second, second] * latency.runs


def test_beyond_noise_is_three_percent_in_three_quarters_of_the_rounds():
    assert Speed.of([1.0] * 8, [1.1] * 8).is_faster
    assert not Speed.of([1.0] * 8, [1.1] * 5 + [0.9] * 3).is_faster
    assert Speed.of([1.1] * 8, [1.0] * 8).is_slower
    assert Speed.of([1.0] * 8, [1.01] * 8).is_equal
