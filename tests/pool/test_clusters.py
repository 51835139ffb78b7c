"""Real workers: processes of this machine, and a Dask cluster on its loopback."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest
from nets import NETS
from rankings import STATIC, ranked
from runs import silent
from torch import nn
from tuning import base, cancelling, closeness, full_loss, in_float_time

import qrecipe
from qrecipe.authoring.tune.trials import ModelBench
from qrecipe.cli.pool import Processes

pytestmark = pytest.mark.usefixtures("many_pieces_in_one_thread")


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


@pytest.fixture(scope="module")
def client():
    """Of a cluster of two workers on loopback, which replaces one that dies."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


class Killing:
    """Progress that kills a worker once something has come back."""

    def __init__(self, client):
        self.worker, *_ = client.run(os.getpid).values()
        self.is_done = False

    def __call__(self, done, total):
        if done == 2:
            self.is_done = True
            threading.Thread(target=os.kill, args=(self.worker, signal.SIGKILL)).start()


def slowly(output, reference):
    time.sleep(0.05)
    return -float((output - reference).abs().max())


@pytest.mark.slow
def test_a_ranking_on_a_dask_cluster_of_two_workers_loses_one_and_is_the_same(client):
    net = NETS["residual"]
    model, batches = net.model(), net.batches(8)
    alone, killing = ranked(model, batches, metric=slowly), Killing(client)
    ranking = qrecipe.sensitivity(
        model, alone.recipe, batches, metric=slowly, progress=killing, pool=client.get_executor()
    )
    assert ranking == alone
    assert killing.is_done


def norm(model: nn.Module) -> float:
    weights = [parameter.detach() for parameter in model.parameters()]
    return float(sum(weight.square().sum() for weight in weights))


@pytest.mark.slow
def test_an_evaluation_of_sites_on_a_dask_cluster_is_the_same(client):
    net = NETS["residual"]
    model, batches = net.model(), net.batches(2)
    together = ranked(model, batches, evaluate=norm, pool=client.get_executor())
    assert together == ranked(model, batches, evaluate=norm)


def run_slowly(model, batch):
    time.sleep(0.05)
    return model(batch)


@pytest.mark.slow
def test_a_comparison_on_a_dask_cluster_of_two_workers_loses_one_and_is_the_same(client):
    net = NETS["residual"]
    model, batches, killing = net.model(), net.batches(12), Killing(client)
    converted = qrecipe.quantize(model, STATIC, batches, progress=silent)
    options = {"forward": run_slowly}
    alone = qrecipe.compare(model, converted, batches, progress=silent, **options)
    together = qrecipe.compare(
        model, converted, batches, progress=killing, pool=client.get_executor(), **options
    )
    assert killing.is_done
    assert together.output == alone.output
    assert {site.name: site.activation for site in together.sites} == {
        site.name: site.activation for site in alone.sites
    }


@pytest.mark.slow
def test_a_search_on_a_dask_cluster_of_two_workers_loses_one_and_makes_the_same_trials(
    client, monkeypatch, tmp_path
):
    times = in_float_time(a=0.4, b=0.3, c=0.3)
    monkeypatch.setattr(ModelBench, "_priced", lambda *args: times)
    model, batches = cancelling()
    evaluate, killing, log = closeness(model, batches), Killing(client), tmp_path / "log.json"
    options = {"max_drop": full_loss(model, batches, evaluate) / 2}
    alone = qrecipe.tune(model, base(), batches, evaluate, progress=silent, **options)
    together = qrecipe.tune(
        model,
        base(),
        batches,
        evaluate,
        progress=killing,
        pool=client.get_executor(),
        resume=log,
        **options,
    )
    assert killing.is_done
    assert [(t.what, t.metric, t.kept) for t in together.trials] == [
        (t.what, t.metric, t.kept) for t in alone.trials
    ]
    assert together.recipe.to_toml() == alone.recipe.to_toml()
    assert any(trial["ahead"] for trial in json.loads(log.read_text())["trials"])
