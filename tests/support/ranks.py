"""Two processes in a group of torch.distributed, which run the same cases."""

from __future__ import annotations

import socket
import warnings
from datetime import timedelta
from multiprocessing import get_context

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import qrecipe
from qrecipe.errors.findings import QRecipeError

COUNT = 2
_PATIENCE = timedelta(seconds=60)
"""After that, a rank that waits for another one fails."""


def run_on_ranks(cases, folder):
    """What each case gives on each rank, by its name; an error is given as its text.

    ``cases`` is a function of a module that gives functions of the rank by their names.
    """
    # The server that forks both imports for both, and has not run autograd: a process that has
    # threads of autograd cannot be forked and train.
    preload = ["torch._dynamo", "qrecipe.pipeline", cases.__module__]
    get_context("forkserver").set_forkserver_preload(preload)
    arguments = (_free_port(), str(folder), cases)
    mp.start_processes(_worker, arguments, nprocs=COUNT, start_method="forkserver")
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(COUNT)]
    return {name: [each[name] for each in found] for name in found[0]}


def _worker(rank, port, folder, cases):
    torch.set_num_threads(1)
    address = f"tcp://localhost:{port}"
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=COUNT, timeout=_PATIENCE
    )
    found = {}
    for name, case in cases().items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", qrecipe.QRecipeWarning)
            try:
                result = case(rank)
            except QRecipeError as error:
                result = str(error)
        codes = {str(w.message).partition(" ")[0] for w in caught}
        found[name] = result, {code for code in codes if code.startswith("QR")}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
