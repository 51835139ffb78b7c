"""Training under DistributedDataParallel: two processes, one model."""

from __future__ import annotations

import socket
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from nets import NETS
from torch.nn.parallel import DistributedDataParallel
from training import qat_recipe

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db

STEPS = 6


KINDS = ("fake_quantize", "learnable")


def _worker(rank, port, folder):
    torch.set_num_threads(1)
    address = f"tcp://localhost:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for kind in KINDS:
        torch.save(_train(rank, kind), f"{folder}/{kind}-{rank}.pt")
    dist.destroy_process_group()


def _train(rank, kind):
    """What the trained and the converted model give, and the trained parameters."""
    torch.manual_seed(0)
    net = NETS["residual"]
    batches = net.batches(2 * STEPS)
    compiled = qrecipe.compile(net.model(), qat_recipe(kind), batches[0])
    prepared = compiled.prepare()
    wrapped = DistributedDataParallel(prepared)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    schedule = qrecipe.qat_schedule(wrapped, optimizer, original_steps=10 * STEPS)
    for step in range(schedule.total_steps):
        loss = wrapped(batches[2 * step + rank]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    converted = compiled.convert(prepared)
    wrapped.eval()
    with torch.no_grad():
        outputs = [model(batches[0]) for model in (wrapped, converted)]
    parameters = {name: p.detach() for name, p in prepared.named_parameters()}
    return outputs, parameters


def _free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    # The server that forks both imports for both, and has not run autograd: a process that has
    # threads of autograd cannot be forked and train.
    get_context("forkserver").set_forkserver_preload(["torch._dynamo", "qrecipe", __name__])
    arguments = (_free_port(), str(folder))
    mp.start_processes(_worker, arguments, nprocs=2, start_method="forkserver")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_one_model_and_convert_it(kind, results):
    (one, weights), (two, others) = (torch.load(results / f"{kind}-{rank}.pt") for rank in (0, 1))
    start = dict(NETS["residual"].model().named_parameters())
    assert not torch.equal(weights["conv1.weight"], start["conv1.weight"])
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    for prepared, converted in (one, two):
        assert output_sqnr_db(prepared, converted) > 25
