"""Work whose workers die for good goes on from its log, on others or without."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import pytest
from executors import AtOnce, Dying, LastFirst
from nets import NETS
from rankings import STATIC, ranked
from runs import silent

import qrecipe
from qrecipe.errors.findings import ExecutionError

NET = NETS["residual"]


pytestmark = pytest.mark.usefixtures("many_pieces_in_one_thread")


def worst(output, reference):
    return -float((output - reference).abs().max())


def norm(model):
    return float(sum(each.detach().square().sum() for each in model.parameters()))


class Refusing(AtOnce):
    """Takes some pieces, and no more: a process has died while pieces were still being sent."""

    def __init__(self, after):
        super().__init__()
        self._after = after

    def submit(self, function, /, *args):
        if len(self.sent) == self._after:
            raise BrokenProcessPool("a process was terminated abruptly")
        return super().submit(function, *args)


@pytest.mark.parametrize(
    ("dying", "measure"),
    [
        (Refusing, {}),
        pytest.param(Dying, {"metric": worst}, marks=pytest.mark.slow),
        pytest.param(Dying, {"evaluate": norm}, marks=pytest.mark.slow),
    ],
)
def test_a_ranking_goes_on_from_what_the_dead_workers_have_finished(tmp_path, dying, measure):
    model, batches, log = NET.model(), NET.batches(2), tmp_path / "log"
    first, second, shown = dying(3), AtOnce(), []
    with pytest.raises(ExecutionError, match=r"QR428 the workers failed after 3 pieces"):
        ranked(model, batches, pool=first, resume=log, **measure)
    resumed = qrecipe.sensitivity(
        model,
        STATIC,
        batches,
        progress=lambda *at: shown.append(at),
        pool=second,
        resume=log,
        **measure,
    )
    whole = AtOnce()
    assert resumed == ranked(model, batches, pool=whole, **measure)
    assert resumed == ranked(model, batches, **measure)
    assert sorted(first.pieces + second.pieces) == sorted(whole.pieces)
    assert [done for done, _ in shown] == list(range(1, shown[-1][1] + 1))


def without_times(comparison):
    sites = [(site.name, site.weight, site.activation) for site in comparison.sites]
    return sites, comparison.output, comparison.batches


def test_a_comparison_goes_on_from_what_the_dead_workers_have_finished(tmp_path):
    model, batches, log = NET.model(), NET.batches(4), tmp_path / "log"
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    options = {"progress": silent, "resume": log}
    first, second = Dying(3), AtOnce()
    with pytest.raises(ExecutionError, match=r"QR428 the workers failed after 3 pieces"):
        qrecipe.compare(model, converted, iter(batches), pool=first, **options)
    resumed = qrecipe.compare(model, converted, batches, pool=second, **options)
    assert first.pieces + second.pieces == [0, 1, 2, 3]
    alone = qrecipe.compare(model, converted, batches, progress=silent)
    assert without_times(resumed) == without_times(alone)
    again = qrecipe.compare(model, converted, batches, **options)  # without workers
    assert without_times(again) == without_times(alone)


@pytest.mark.parametrize(
    "measure", [{}, pytest.param({"metric": worst}, marks=pytest.mark.slow)], ids=" ".join
)
def test_work_of_workers_goes_on_without_them_and_the_other_way_round(tmp_path, measure):
    model, batches = NET.model(), NET.batches(2)
    whole = ranked(model, batches, **measure)
    with pytest.raises(ExecutionError, match="QR428"):
        ranked(model, batches, pool=Dying(6), resume=tmp_path / "log", **measure)
    assert ranked(model, batches, resume=tmp_path / "log", **measure) == whole
    lines = (tmp_path / "log").read_bytes().splitlines(keepends=True)
    for count in (0, 5, len(lines) - 1):  # as if a process had been ended after these
        (tmp_path / "log").write_bytes(b"".join(lines[: 1 + count]))
        executor = LastFirst()
        assert ranked(model, batches, pool=executor, resume=tmp_path / "log", **measure) == whole
    finished = AtOnce()
    assert ranked(model, batches, pool=finished, resume=tmp_path / "log", **measure) == whole
    assert not finished.sent


def interrupt(done, total):
    if done == total // 2:
        raise KeyboardInterrupt


def test_an_interrupt_on_workers_leaves_a_log_to_go_on_from(tmp_path):
    model, batches, log = NET.model(), NET.batches(3), tmp_path / "log"
    options = {"pool": LastFirst(), "progress": interrupt}
    with pytest.warns(qrecipe.QRecipeWarning, match="QR212"):
        qrecipe.sensitivity(model, STATIC, batches, resume=log, **options)
    kept = len(log.read_text().splitlines()) - 1
    executor = AtOnce()
    assert ranked(model, batches, pool=executor, resume=log) == ranked(model, batches)
    assert len(executor.sent) == 12 - kept
    converted, log = qrecipe.quantize(model, STATIC, batches, progress=silent), tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        qrecipe.compare(model, converted, batches, resume=log, **options)
    kept, shown = len(log.read_text().splitlines()) - 1, []
    executor, progress = AtOnce(), lambda *at: shown.append(at)
    qrecipe.compare(model, converted, batches, progress=progress, pool=executor, resume=log)
    assert len(executor.sent) == 3 - kept
    assert shown == [(1, 3), (2, 3), (3, 3)]


class Fatal:
    """A measure that counts its calls in a file, and kills the process of one of them."""

    def __init__(self, calls, fatal):
        self.calls, self.fatal = str(calls), fatal

    def __call__(self, output, reference):
        with open(self.calls, "ab", buffering=0) as file:
            file.write(b".")
            if file.tell() == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
        return worst(output, reference)


@pytest.mark.slow
def test_a_ranking_of_processes_of_which_one_is_killed_goes_on_in_others(tmp_path):
    model, batches, log = NET.model(), NET.batches(2), tmp_path / "log"
    whole = ranked(model, batches, metric=Fatal(tmp_path / "whole", None))

    def on_processes(calls, fatal):
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            metric = Fatal(tmp_path / calls, fatal)
            return ranked(model, batches, metric=metric, pool=pool, resume=log)

    with pytest.raises(ExecutionError, match=r"QR428 the workers failed.*BrokenProcessPool"):
        on_processes("first", 13)
    kept = len(log.read_text().splitlines()) - 1
    assert 0 < kept < 8
    assert on_processes("second", None) == whole
    calls = (tmp_path / "second").stat().st_size
    assert calls == 3 * (8 - kept)  # of a piece: the float model and two sites
