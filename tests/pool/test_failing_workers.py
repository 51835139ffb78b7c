"""Errors in workers, workers that die, and pools that cannot work."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from executors import AtOnce, Dying
from nets import NETS
from plans import net_of
from rankings import ranked
from torch import nn

import qrecipe
from qrecipe.errors.findings import (
    CalibrationError,
    ExecutionError,
    QRecipeError,
)
from qrecipe.measure.sensitivity import steps


def errors_of(call):
    with pytest.raises(QRecipeError) as raised:
        call()
    return (
        type(raised.value),
        [finding.code for finding in raised.value.findings],
        str(raised.value),
    )


def broken_metric(output, reference):
    raise ValueError("no luck")


@pytest.mark.parametrize("fault", ["batch", "metric", "integers", "memory"])
def test_errors_in_workers_are_those_of_one_process(fault):
    net = NETS["residual" if fault == "integers" else "mlp"]
    model, batches, options = net.model(), net.batches(3), {}
    if fault == "batch":
        batches[2] = torch.randn(3, 7)
    elif fault == "metric":
        options = {"metric": broken_metric}
    elif fault == "integers":
        model = net_of(lambda self, x: self.conv(x).argmax(1), conv=nn.Conv2d(3, 4, 1))
    else:
        options = {"memory_limit": 10}
    alone = errors_of(lambda: ranked(model, batches, **options))
    assert errors_of(lambda: ranked(model, batches, pool=AtOnce(), **options)) == alone


def test_an_error_that_is_not_ours_has_the_workers_traceback(monkeypatch):
    def fail(*args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(steps.Scorer, "parts", fail)
    net = NETS["mlp"]
    with pytest.raises(ZeroDivisionError) as raised:
        ranked(net.model(), net.batches(2), pool=AtOnce())
    assert "in fail" in str(raised.value.__cause__)


def test_workers_that_die_are_an_error_that_says_so_once():
    net = NETS["residual"]
    with pytest.raises(ExecutionError) as raised:
        ranked(net.model(), net.batches(3), pool=Dying(2))
    assert str(raised.value) == (
        "QR428 the workers failed after 2 pieces: BrokenProcessPool: "
        "a process was terminated abruptly\n"
        "  a worker that dies has often run out of memory: try fewer workers at once; "
        "with resume (--log), finished pieces are kept"
    )


def test_workers_that_can_be_made_anew_go_on_with_what_is_left():
    net = NETS["residual"]
    model, batches = net.model(), net.batches(3)
    made = []

    def make():
        made.append(Dying(len(made)))  # the second one does one piece, the third two
        return made[-1]

    assert ranked(model, batches, pool=qrecipe.Pool(make)) == ranked(model, batches)
    assert [len(each.sent) for each in made] == [0, 1, 2]


def test_workers_that_die_again_without_any_piece_are_given_up():
    made = []

    def make():
        made.append(0)
        return Dying(0)

    net = NETS["residual"]
    with pytest.raises(ExecutionError, match=r"QR428 the workers failed after 0 pieces"):
        ranked(net.model(), net.batches(3), pool=qrecipe.Pool(make))
    assert len(made) == 2


def test_an_executor_that_is_shut_down_is_an_error_of_ours():
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    net = NETS["mlp"]
    with pytest.raises(ExecutionError, match=r"QR428.*cannot schedule new futures"):
        ranked(net.model(), net.batches(2), pool=executor)


class Forgetful(AtOnce):
    """Gives something else back than what a piece has returned."""

    def submit(self, function, /, *args):
        future = Future()
        future.set_result(None)
        return future


def test_an_executor_that_loses_results_has_failed():
    net = NETS["mlp"]
    with pytest.raises(ExecutionError, match=r"QR428 .*returns a NoneType for a piece"):
        ranked(net.model(), net.batches(2), pool=Forgetful())


@pytest.mark.parametrize("name", ["metric", "batch 1"])
def test_what_else_cannot_be_pickled_is_named(name):
    net = NETS["mlp"]
    lock, batches = threading.Lock(), net.batches(2)
    options = {"metric": lambda output, reference: lock.acquire()} if name == "metric" else {}
    if name != "metric":
        batches[1] = {"x": batches[1], "lock": lock}
        options = {"forward": lambda model, batch: model(batch)}
    with pytest.raises(ExecutionError, match=f"QR426 {name} cannot be pickled.*_thread.lock"):
        ranked(net.model(), batches, pool=AtOnce(), **options)


def forking():
    return ProcessPoolExecutor(1, mp_context=get_context("fork"))


@pytest.mark.parametrize(
    ("pool", "text"),
    [
        (3, "pool is a int, not an executor"),
        (ThreadPoolExecutor, "pool is a [A-Za-z]+, not an executor\n.*qrecipe.Pool.function"),
        (qrecipe.Pool(3), "executor is neither"),
        (qrecipe.Pool(dict), "the function of the pool returns a dict"),
        (qrecipe.Pool(AtOnce, workers=0), "workers is 0"),
        (qrecipe.Pool(forking, factory=3), "factory must be a function"),
        (qrecipe.Pool(forking), "the processes of this pool are forked"),
    ],
)
def test_a_pool_that_cannot_work_is_refused(pool, text):
    net = NETS["mlp"]
    with pytest.raises(ExecutionError, match=f"QR425 {text}"):
        ranked(net.model(), net.batches(2), pool=pool)


def test_an_estimate_is_not_cut_into_pieces():
    net = NETS["mlp"]
    with pytest.raises(ExecutionError, match="QR425 an estimate is a single pass"):
        ranked(net.model(), net.batches(2), method="estimate", pool=AtOnce())


def test_a_bad_batch_is_found_while_batches_are_sent():
    def batches():
        yield torch.randn(8, 6)
        raise OSError("disk gone")

    class Loader:
        def __iter__(self):
            return batches()

    with pytest.raises(CalibrationError, match="QR402 the loader failed at batch 1"):
        ranked(NETS["mlp"].model(), Loader(), pool=AtOnce())
