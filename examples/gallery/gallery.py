"""Measure the recipes of the gallery: `python examples/gallery/gallery.py [ARCHITECTURE ...]`.

One row for each architecture, all of them by default. The weights are random: SQNR shows how noise
accumulates in an untrained net, and says nothing about accuracy. Latency is the CPU time of one
thread for one image or one sequence, for the eager float model and the quantized one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from architectures import FACTORIES, similar
from safetensors.torch import save_model
from torch import Tensor, nn

import qrecipe

FOLDER = Path(__file__).parent
CALIBRATION_BATCHES = 10
TIMED_RUNS = 11
ROW = "{:<20}  {:>9}  {:>11}  {:>5}  {:>4}  {:>13}  {:>9}  {}"


@dataclass(frozen=True, slots=True)
class Figures:
    """One recipe on its architecture: numbers of sites, sizes in bytes, times in seconds."""

    sites: Counter[str]
    boundaries: int
    float_size: int
    quantized_size: int
    float_time: float
    quantized_time: float
    sqnr_db: float


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description="Measure the gallery's recipes.")
    parser.add_argument("names", metavar="ARCHITECTURE", nargs="*", help="all without any")
    names = parser.parse_args().names or sorted(FACTORIES)
    unknown = sorted(set(names).difference(FACTORIES))
    if unknown:
        parser.error(f"no architecture {', '.join(unknown)}: there are {', '.join(FACTORIES)}")
    torch.set_num_threads(1)
    columns = ("quantized", "passthrough", "float", "q/dq", "times smaller", "SQNR (dB)", "latency")
    print(ROW.format("architecture", *columns))
    for name in names:
        print(row(name, measured(name)), flush=True)


def row(name: str, figures: Figures) -> str:
    """A line of the table."""
    return ROW.format(
        name,
        *(figures.sites[verdict] for verdict in ("quantized", "passthrough", "float")),
        figures.boundaries,
        f"{figures.float_size / figures.quantized_size:.2f}",
        f"{figures.sqnr_db:.1f}",
        f"float/quantized = {figures.float_time / figures.quantized_time:.2f}",
    )


def measured(name: str) -> Figures:
    """Quantize an architecture with the recipe of the same name, and measure both models."""
    model, (example,) = FACTORIES[name]()
    compiled = qrecipe.compile(model, FOLDER / f"{name}.toml", example)
    prepared = compiled.prepare()
    generator = torch.Generator().manual_seed(1)
    batches = [similar(example, generator) for _ in range(CALIBRATION_BATCHES)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "QR234", qrecipe.QRecipeWarning)  # all batches are alike
        qrecipe.calibrate(prepared, batches)
    converted = compiled.convert(prepared)

    unseen = similar(example, generator)
    output = qrecipe.compare(model, converted, [unseen]).output
    assert output is not None
    float_time, quantized_time = cpu_times(model, converted, unseen)
    float_size, quantized_size = file_sizes(model, converted)
    return Figures(
        sites=Counter(site.verdict for site in compiled.plan.sites),
        boundaries=compiled.plan.boundaries,
        float_size=float_size,
        quantized_size=quantized_size,
        float_time=float_time,
        quantized_time=quantized_time,
        sqnr_db=output.sqnr_db,
    )


def cpu_times(model: nn.Module, converted: nn.Module, inputs: Tensor) -> tuple[float, float]:
    """Median seconds of a call of each, in turn, so that other load affects both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for _ in range(TIMED_RUNS):
            for called, taken in zip((model, converted), times, strict=True):
                started = time.process_time()
                called(inputs)
                taken.append(time.process_time() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def file_sizes(model: nn.Module, converted: nn.Module) -> tuple[int, int]:
    """The sizes in bytes of both stored models."""
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "float.safetensors"), Path(folder, "int8.safetensors")
        save_model(model, str(before))
        qrecipe.save_quantized(converted, after)
        return before.stat().st_size, after.stat().st_size


if __name__ == "__main__":
    main()
