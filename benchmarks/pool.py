"""What workers gain: exact sensitivity of a ResNet-18-like net, and a search on the digits.

Processes of one thread each, that have loaded torch before. Wall time, and the runs with one and
with two workers take turns; so this needs two cores that nobody else uses. Beside it stands the CPU
time of this process and of the busiest worker: what a run takes where each has a core of its own.
What is sent and what pieces cost is measured in this process, in CPU time.

    python benchmarks/pool.py               # about 6 minutes on two quiet cores
    python benchmarks/pool.py --only rank   # without the search
    python benchmarks/pool.py --only costs  # what pieces cost: ResNet-18-like, and 300 sites
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import pickle
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from nets import LinearChain, ResNet18Like, warmed
from torch import Tensor, nn

import qrecipe
from qrecipe.authoring.tune.log import TrialLog
from qrecipe.pool import worker

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))

_ROUNDS = 3
_BATCHES = 32
_PIECES = 11
_MANY = 100
_RECIPE = "builtin:x86-static"


class Measuring(Executor):
    """Runs the first pieces here and now, and notes their bytes and CPU seconds."""

    def __init__(self) -> None:
        worker._BEGUN.clear()
        self.sites: dict[int, list[str]] = {}
        self.bytes: list[int] = []
        self.seconds: list[float] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if len(self.seconds) == _PIECES:
            raise KeyboardInterrupt
        index, names = args[1]
        self.sites.setdefault(index, []).extend(names)
        self.bytes.append(len(pickle.dumps((fn, args, kwargs))))
        start, future = time.process_time(), Future[Any]()
        future.set_result(fn(*args, **kwargs))
        self.seconds.append(time.process_time() - start)
        return future


@contextlib.contextmanager
def _pools() -> Iterator[dict[int, ProcessPoolExecutor]]:
    """One and two processes that have done some work."""
    context = get_context("spawn")
    with (
        ProcessPoolExecutor(1, mp_context=context) as one,
        ProcessPoolExecutor(2, mp_context=context) as two,
    ):
        for pool in (one, two):
            model, batches = LinearChain(4), [torch.randn(8, 64) for _ in range(8)]
            _rank(model, batches, pool)
        yield {1: one, 2: two}


def _rank(model: nn.Module, batches: list[Tensor], pool: Executor | None) -> qrecipe.Ranking:
    return qrecipe.sensitivity(model, _RECIPE, batches, pool=pool, progress=False)


def _net(batches: int) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = warmed(ResNet18Like(), 16, 3, 64, 64)
    return model, [torch.randn(16, 3, 64, 64) for _ in range(batches)]


def _rankings(pools: dict[int, ProcessPoolExecutor], rounds: int) -> None:
    model, batches = _net(_BATCHES)
    alone, expected = _timed(lambda: _rank(model, batches, None))
    seconds: _Taken = {1: [], 2: []}
    for _ in range(rounds):
        for count, pool in pools.items():
            taken, found = _timed(partial(_rank, model, batches, pool), pool)
            assert found == expected, "the rankings differ"
            seconds[count].append(taken)
    print(f"sensitivity of {len(expected.sites)} sites, {_BATCHES} batches of 16 at 64x64")
    print(f"  in this process  {alone.wall:7.1f} s, CPU {alone.cpu:7.1f} s")
    _report(seconds)


def _searches(pools: dict[int, ProcessPoolExecutor], rounds: int) -> None:
    from digits import calibration, evaluate
    from rescale import stressed

    model, batches, log = stressed(), calibration(), Path("pool-trials.json")

    def search(pool: Executor | None) -> qrecipe.TuningResult:
        """A search with the times of sites that were measured before: they decide its trials."""
        if log.exists():
            known = TrialLog.model_validate_json(log.read_text())
            log.write_text(known.model_copy(update={"trials": [], "ahead": []}).model_dump_json())
        return qrecipe.tune(
            *(model, _RECIPE, batches, evaluate),
            max_drop=0.003,
            resume=log,
            pool=pool,
            progress=False,
        )

    search(None)
    alone, expected = _timed(lambda: search(None))
    seconds: _Taken = {1: [], 2: []}
    for _ in range(rounds):
        for count, pool in pools.items():
            taken, found = _timed(partial(search, pool), pool)
            metrics = [[trial.metric for trial in each.trials] for each in (found, expected)]
            assert metrics[0] == metrics[1], "the searches differ"
            seconds[count].append(taken)
    known = TrialLog.model_validate_json(log.read_text())
    early = sum(trial.ahead for trial in known.trials)
    print(f"tune of the digits: {len(expected.trials)} trials, without ranking and profile")
    print(f"  with 2 workers {early} were tried ahead of need, and {len(known.ahead)} in vain")
    print(f"  in this process  {alone.wall:7.1f} s, CPU {alone.cpu:7.1f} s")
    _report(seconds)
    log.unlink()


@dataclass(frozen=True)
class Taken:
    """Seconds: by the clock, and on the CPU of this process and of the busiest worker together."""

    wall: float
    cpu: float


_Taken = dict[int, list[Taken]]


def _report(seconds: _Taken) -> None:
    for count, taken in seconds.items():
        wall, cpu = (statistics.median(getattr(e, key) for e in taken) for key in ("wall", "cpu"))
        workers = f"{count} worker{'s' if count > 1 else ' '}"
        print(f"  {workers}        {wall:7.1f} s, CPU {cpu:7.1f} s")
    for key in ("wall", "cpu"):
        pairs = zip(seconds[1], seconds[2], strict=True)
        ratios = [getattr(one, key) / getattr(two, key) for one, two in pairs]
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"  2 workers, {key}: {statistics.median(ratios):.2f} times as fast as 1 ({shown})")


def _timed(run: Callable[[], Any], pool: ProcessPoolExecutor | None = None) -> tuple[Taken, Any]:
    workers = list(pool._processes) if pool is not None else []
    before, start, cpu = [_cpu(pid) for pid in workers], time.perf_counter(), time.process_time()
    value = run()
    busiest = max((_cpu(pid) - was for pid, was in zip(workers, before, strict=True)), default=0.0)
    return Taken(time.perf_counter() - start, time.process_time() - cpu + busiest), value


def _cpu(pid: int) -> float:
    """CPU seconds of another process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cost:
    """CPU seconds of a ranking: here, to begin in each worker, and of a piece; and its parts."""

    here: float
    begin: float
    piece: float
    bytes: float
    sites: int
    pieces: int

    @classmethod
    def of(cls, model: nn.Module, batches: list[Tensor]) -> Cost:
        pool, start = Measuring(), time.process_time()
        with contextlib.suppress(KeyboardInterrupt):
            _rank(model, batches, pool)
        whole = time.process_time() - start
        first, *others = pool.seconds
        piece, sites = statistics.median(others), pool.sites[0]
        count = (len(sites) + 31) // 32
        sent = statistics.median(pool.bytes)
        return cls(whole - sum(pool.seconds), first - piece, piece, sent, len(sites), count)


def _costs() -> None:
    """What is sent and what it costs, and from there what more workers would gain."""
    torch.manual_seed(0)
    chain = LinearChain(300, 256).eval(), [torch.randn(64, 256) for _ in range(_PIECES + 1)]
    for model, batches in (_net(_PIECES + 1), chain):
        few, more = Cost.of(model, batches[:2]), Cost.of(model, batches)
        calibration = (more.begin - few.begin) / (len(batches) - 2)
        begin = few.begin - 2 * calibration
        print(f"{few.sites} sites, CPU seconds")
        print(f"  in this process   {few.here:7.2f}")
        print(f"  to begin          {begin:7.2f} in each worker, and {calibration:.3f} a batch")
        print(f"  a piece           {more.piece:7.3f}, {more.pieces} for each batch")
        print(f"  sent for a piece  {more.bytes:7.0f} bytes")
        fixed, alone = few.here + begin + _MANY * calibration, 0.0
        for workers in (1, 2, 8, 64, 512):
            taken = fixed + math.ceil(_MANY * more.pieces / workers) * more.piece
            alone = alone or taken
            gain = f"{taken:8.1f} s, {alone / taken:5.1f} times"
            print(f"  {workers:3} workers, {_MANY} batches, by arithmetic {gain}")


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["rank", "tune", "costs"])
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    given = parser.parse_args()
    only = given.only
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if only in (None, "costs"):
        _costs()
    if only != "costs":
        with _pools() as pools:
            if only != "tune":
                _rankings(pools, given.rounds)
            if only != "rank":
                _searches(pools, given.rounds)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    _main()
