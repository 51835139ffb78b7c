"""Real workers: processes of this machine, and a Dask cluster on its loopback."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest
import torch
from nets import NETS
from rankings import ranked
from torch import nn

import qrecipe
from qrecipe.cli.pool import Processes
from qrecipe.errors.findings import ExecutionError
from qrecipe.measure.sensitivity import pieces


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(pieces, "_AT_ONCE", 2)  # many pieces
    yield
    torch.set_num_threads(former)


def spawned(count):
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"))


def test_another_process_gives_what_this_one_gives():
    net = NETS["residual"]
    model, batches = net.model(), net.batches(2)
    with spawned(1) as pool:
        assert ranked(model, batches, pool=pool) == ranked(model, batches)


class Fatal:
    """Kills its process where it is unpickled for the first time, as a lack of memory would."""

    def __init__(self, flag):
        self.flag = flag

    def __call__(self, output, reference):
        if os.getpid() != self.flag[1] and not os.path.exists(self.flag[0]):
            with open(self.flag[0], "w"):
                os.kill(os.getpid(), signal.SIGKILL)
        return -float((output - reference).abs().max())


@pytest.mark.slow
def test_processes_of_our_own_are_made_anew_when_one_is_killed(tmp_path):
    net = NETS["residual"]
    model, batches = net.model(), net.batches(2)
    metric = Fatal((str(tmp_path / "killed"), os.getpid()))
    alone = ranked(model, batches, metric=metric)
    pool = qrecipe.Pool(partial(Processes, 2))
    assert ranked(model, batches, metric=metric, pool=pool) == alone
    assert (tmp_path / "killed").exists()


@pytest.mark.slow
def test_processes_of_the_caller_that_are_killed_are_an_error(tmp_path):
    net = NETS["residual"]
    metric = Fatal((str(tmp_path / "killed"), os.getpid()))
    with (
        spawned(2) as pool,
        pytest.raises(ExecutionError, match=r"QR428 the workers failed.*BrokenProcessPool"),
    ):
        ranked(net.model(), net.batches(2), metric=metric, pool=pool)


@pytest.mark.slow
def test_loky_is_a_pool_too():
    loky = pytest.importorskip("joblib.externals.loky")
    net = NETS["residual"]
    model, batches = net.model(), net.batches(2)
    pool = loky.get_reusable_executor(2)
    try:
        together = ranked(model, batches, metric=lambda a, b: float((a - b).sum()), pool=pool)
    finally:
        pool.shutdown(kill_workers=True)
    assert together == ranked(model, batches, metric=lambda a, b: float((a - b).sum()))


def slowly(output, reference):
    time.sleep(0.05)
    return -float((output - reference).abs().max())


@pytest.mark.slow
def test_a_dask_cluster_of_two_workers_loses_one_and_gives_the_same():
    distributed = pytest.importorskip("distributed")
    net = NETS["residual"]
    model, batches = net.model(), net.batches(8)
    alone = ranked(model, batches, metric=slowly)
    converted = qrecipe.quantize(model, alone.recipe, batches, progress=False)
    killed = []
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        workers = list(client.run(os.getpid).values())

        def kill():
            killed.append(workers[0])
            os.kill(workers[0], signal.SIGKILL)

        def progress(done, total):
            if done == total // 4:
                threading.Thread(target=kill).start()

        ranking = qrecipe.sensitivity(
            model,
            alone.recipe,
            batches,
            metric=slowly,
            progress=progress,
            pool=client.get_executor(),
        )
        evaluated = ranked(model, batches, evaluate=norm, pool=client.get_executor())
        compared = qrecipe.compare(
            model, converted, batches, progress=False, pool=client.get_executor()
        )
    assert killed
    assert ranking == alone
    assert evaluated == ranked(model, batches, evaluate=norm)
    assert compared.output == qrecipe.compare(model, converted, batches, progress=False).output


def norm(model: nn.Module) -> float:
    weights = [parameter.detach() for parameter in model.parameters()]
    return float(sum(weight.square().sum() for weight in weights))
