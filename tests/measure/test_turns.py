"""What models are timed with, and what they are compared by."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from torch import nn

from qrecipe.measure.profile.report import _ratio
from qrecipe.measure.turns import Latency, Pass, Speed, Timing, compare_latency, run_in_turn
from qrecipe.model.call import Inputs
from qrecipe.process.threads import clock


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


def test_there_are_as_many_rounds_as_there_is_time_for_within_limits(one_thread):
    def rounds(*limits):
        passes = [Pass(lambda inputs: time.sleep(0.002), [Inputs(), Inputs()]) for _ in range(2)]
        told = []
        run_in_turn(passes, *limits, show=lambda *step: told.append(step))
        count = len(passes[0].whole)
        assert told == [(done, count) for done in range(1, count + 1)]
        assert [len(each.parts.rounds) for each in passes] == [count, count]
        return count

    assert rounds(3) == 3
    assert rounds(3, 4, 10.0) == 4
    assert 3 < rounds(3, 1000, 0.2) < 30


def test_the_interval_holds_the_median_as_often_as_it_says():
    draw = random.Random(0)
    held = 0
    for _ in range(400):
        speed = Speed.of([1.0] * 30, [draw.lognormvariate(0, 0.3) for _ in range(30)])
        held += speed.low <= 1 <= speed.high
    assert 0.93 < held / 400 < 0.99


def test_more_rounds_tell_smaller_differences():
    draw = random.Random(0)
    rounds = [draw.lognormvariate(0.1, 0.2) for _ in range(200)]
    few, many = (Speed.of([1.0] * count, rounds[:count]) for count in (15, 200))
    assert few.high - few.low > 2 * (many.high - many.low)
    assert many.is_faster


def test_beyond_noise_is_more_than_three_percent():
    assert Speed.of([1.0] * 8, [1.1] * 8).is_faster
    assert not Speed.of([1.0] * 8, [1.1] * 5 + [0.9] * 3).is_faster
    assert Speed.of([1.1] * 8, [1.0] * 8).is_slower
    assert Speed.of([1.0] * 8, [1.01] * 8).is_equal


def test_no_ratio_is_given_where_noise_is_larger_than_the_difference():
    noisy = Speed.of([1.0, 2.0] * 10, [2.0, 1.0] * 10)
    assert noisy.text == "within noise"
    assert Speed.of([1.0] * 20, [2.0] * 20).text == "2.00"
    assert Speed.of([1.0, 1.1] * 10, [1.0, 1.1] * 10).text == "1.00"  # a model against itself
    assert _ratio(Timing(1.0, 0.3), Timing(0.6, 0.2)) == ""
    assert _ratio(Timing(1.0, 0.1), Timing(0.5, 0.1)) == "2.00"


def test_the_latency_of_quantize_has_its_spread():
    latency = Latency.of([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert (latency.reference, latency.reference_spread, latency.candidate_spread) == (3.0, 1.0, 0)
