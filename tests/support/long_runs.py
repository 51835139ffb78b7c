"""Many batches and many repeats: what the process holds stays the same."""

from __future__ import annotations

import gc
import linecache
import resource
import sys
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from faults import STATIC, Tally
from nets import NETS

import qrecipe


def resident() -> int:
    """The bytes of this process in memory, after collecting garbage."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@dataclass(frozen=True)
class Held:
    """What a process holds: bytes in memory, objects, modules, and lines of source kept."""

    bytes: int
    objects: int
    modules: int
    sources: int

    @classmethod
    def now(cls) -> Held:
        size = resident()
        return cls(size, len(gc.get_objects()), len(sys.modules), len(linecache.cache))


def many_batches(times: int, tally: Tally) -> None:
    """Calibrate on many batches: none is kept, and memory is flat."""
    what = "calibration batches"
    text = f'format = 1\nextends = "{STATIC}"\n[calibration]\nmax_batches = {times}\n'
    model = NETS["residual"].model()
    compiled = qrecipe.compile(model, qrecipe.parse_recipe(text), NETS["residual"].batches(1)[0])
    prepared = compiled.prepare()
    alive: list[weakref.ref[torch.Tensor]] = []
    sizes: dict[int, int] = {}

    def batches() -> Iterator[torch.Tensor]:
        for number in range(times):
            if number in (times // 5, times - 1):
                sizes[number] = resident()
            batch = torch.randn(64, 3, 16, 16)
            alive.append(weakref.ref(batch))
            tally.tried[what] += 1
            yield batch

    qrecipe.calibrate(prepared, batches(), progress=False)
    first, last = sizes.values()
    kept = sum(reference() is not None for reference in alive)
    tally.ends[f"{what}: {kept} batches kept, {(last - first) / 2**20:+.1f} MiB"] += 1
    if kept > 3:
        tally.failures.append(f"{what}: {kept} batches are kept")
    if last - first > 8 * 2**20:
        tally.failures.append(f"{what}: the process grew by {(last - first) / 2**20:.1f} MiB")


def repeats(times: int, tally: Tally) -> None:
    """Plan, quantize, save and load again and again: what the process holds stays the same."""
    what = "repeats of plan, quantize, save and load"
    net = NETS["residual"]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "net.safetensors"

        def once() -> None:
            model = net.model()
            qrecipe.plan(model, STATIC, net.batches(1)[0])
            qrecipe.save_quantized(
                qrecipe.quantize(model, STATIC, net.batches(2), progress=False), path
            )
            qrecipe.load_quantized(path, model)(net.batches(1)[0])
            tally.tried[what] += 1

        for _ in range(max(3, times // 10)):
            once()
        before = Held.now()
        while tally.tried[what] < times:
            once()
        after = Held.now()
    grown = {key: getattr(after, key) - getattr(before, key) for key in vars(after)}
    tally.ends[f"{what}: {grown}"] += 1
    rounds = times - max(3, times // 10)
    if grown["bytes"] > 8 * 2**20:
        tally.failures.append(f"{what}: the process grew by {grown['bytes'] / 2**20:.1f} MiB")
    # what waits for the garbage collector is a part of a few rounds
    if grown["modules"] or grown["sources"] > 100 + rounds // 10:
        tally.failures.append(f"{what}: {grown}")
