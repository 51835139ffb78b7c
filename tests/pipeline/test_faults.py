"""Kills, full disks, too little memory and long runs do no harm; `tools/faults.py` tries more."""

from __future__ import annotations

import gc
import linecache
import subprocess
import sys
from random import Random

import pytest
import torch
from faults import FEW_BATCHES, Tally
from long_runs import many_batches, resident
from memory_faults import ALLOCATOR, out_of_memory
from nets import NETS
from places import ROOT
from torch import fx, nn

import qrecipe

STATIC = "builtin:x86-static"


def some(share, *only):
    """A share of the faults, in a process with one thread, which forks."""
    command = [sys.executable, "tools/faults.py", "--share", str(share), "--seed", "7"]
    return subprocess.run(
        [*command, "--only", *only], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_a_file_is_whole_whatever_stops_its_writing():
    done = some(0.03, "kills", "disks")
    assert done.returncode == 0, done.stdout + done.stderr
    for fault in ("kill -9", "disk full"):
        for kind in ("lock files", "overlays", "HTML pages", "stored models", "plots"):
            assert f"{fault}, {kind}: 1\n" in done.stdout


def test_lack_of_memory_is_said_at_every_call_and_nothing_else_changes():
    tally = Tally()
    out_of_memory("mlp", 12, Random(7), tally)
    assert tally.failures == []
    (end,) = tally.ends
    assert end.endswith("QR407")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(ALLOCATOR)])
def test_a_model_that_gets_no_memory_is_not_blamed_for_it(error):
    class Greedy(nn.Sequential):
        def forward(self, x):
            raise error

    model = Greedy(nn.Linear(4, 4)).eval()
    with pytest.raises(qrecipe.ExecutionError, match="QR407 there is not enough memory") as raised:
        qrecipe.plan(model, STATIC, torch.rand(2, 4))
    (finding,) = raised.value.findings
    assert ("4,294,967,296 bytes" in finding.message) == isinstance(error, RuntimeError)


def test_another_error_of_a_model_stays_the_models():
    class Broken(nn.Sequential):
        def forward(self, x):
            raise RuntimeError("shapes do not fit")

    with pytest.raises(qrecipe.PlanError, match="QR307"):
        qrecipe.plan(Broken(nn.Linear(4, 4)).eval(), STATIC, torch.rand(2, 4))


def test_no_batch_is_kept_by_calibration():
    tally = Tally()
    many_batches(40, tally)
    assert tally.failures == []


@pytest.mark.parametrize("executor", ["fx", "pt2e"])
def test_no_graph_is_kept_once_nobody_holds_the_model(executor):
    if executor == "pt2e":
        pytest.importorskip("torchao")
    net, text = NETS["mlp"], f'format = 1\nextends = "{STATIC}"\nexecutor = "{executor}"\n'
    recipe = qrecipe.parse_recipe(f'{text}[lint]\nignore = ["QR201"]\n')
    found = []
    for _ in range(3):  # the first time, torch caches some of its own
        qrecipe.quantize(net.model(), recipe, net.batches(2), progress=False)
        gc.collect()
        found.append(sum(isinstance(each, fx.GraphModule) for each in gc.get_objects()))
    assert found[1] == found[2]


def test_the_source_of_a_graph_goes_with_the_graph_and_others_stay():
    others = fx.symbolic_trace(nn.ReLU())
    resident()  # collects what earlier tests left
    net = NETS["mlp"]
    made = [qrecipe.quantize(net.model(), FEW_BATCHES, net.batches(2), progress=False)]
    mine = type(made[0]).forward.__code__.co_filename
    assert linecache.getlines(mine)
    for _ in range(2):
        qrecipe.quantize(net.model(), FEW_BATCHES, net.batches(2), progress=False)
        resident()
    before = len(linecache.cache)
    assert linecache.getlines(mine), "its graph is still there"
    made.clear()
    resident()
    for _ in range(2):
        qrecipe.quantize(net.model(), FEW_BATCHES, net.batches(2), progress=False)
        resident()
    assert not linecache.getlines(mine)
    assert len(linecache.cache) < before + 5
    assert linecache.getlines(type(others).forward.__code__.co_filename)


@pytest.mark.slow
@pytest.mark.parametrize("only", ["kills", "disks", "memory", "runs"])
def test_all_faults(only):
    done = some(1, only)
    assert done.returncode == 0, done.stdout + done.stderr
