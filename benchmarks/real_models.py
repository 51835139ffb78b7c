"""What `qrecipe.suggest` makes of models as people write them.

Each model of torchvision, timm, transformers and torch that the tests know is quantized by the
recipe that `qrecipe.suggest` proposes for it. Printed for each, as a Markdown table:

- the mode of the recipe, and the share of multiplications that no longer run in float, counted by
  torch's FlopCounterMode in the float and in the quantized model;
- how many quantize and dequantize calls the quantized graphs have;
- SQNR of the outputs, in dB, on a batch that was not used for calibration;
- CPU time of float over int8 at batch 1 and 8: one thread, interleaved, median of --runs calls.

A model that cannot be quantized is a row with the reason.

    OMP_NUM_THREADS=1 python benchmarks/real_models.py [--runs 9] [--only NAME ...] [--json FILE]

``--page`` writes docs/real-models.md. ``--suggest`` only measures how many times as long, in CPU
time, `qrecipe.suggest` takes with the transforms that it tries as without: interleaved, median of
--runs pairs.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import QRecipeError
from qrecipe.planning.cpu import cpu_name

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from corpus import TORCHVISION
from libraries import WRITTEN, Size, Written, call, transformers

PAGE = Path(__file__).parents[1] / "docs" / "real-models.md"
INTRODUCTION = f"""\
# Real models

This page shows what the recipe of `qrecipe suggest` does to models of torchvision, timm,
transformers and torch.
`OMP_NUM_THREADS=1 python benchmarks/real_models.py --page` writes this page; it was written with
torch {torch.__version__}, {cpu_name()}.

**int8 share** is the share of multiplications that no longer run in float, counted by torch's
FlopCounterMode. **q/dq** counts the quantize and dequantize calls of the quantized graphs: a
network that runs in int8 throughout has one quantize for each input and one dequantize for each
output, and a dynamic one has none. **SQNR** is the signal-to-quantization-noise ratio of the
outputs, on a batch that was not used for calibration; with random weights it says nothing about
accuracy. **Speed** is the CPU time of float divided by that of int8: one thread, interleaved, the
median of several calls, with a model that is loaded for each batch size.
**Seconds** are CPU time of suggest and quantize, calibration and audit included.

Images have 128 pixels. The models of transformers and torch.nn are as wide as the published base
models (768 features, 12 heads) and have two of their layers; they read texts of 128 tokens, images
of 224 pixels (as vit_b_16 does) or ten seconds of speech. r3d_18 sees 8 frames of 64 pixels.

The [benchmarks](benchmarks.md) compare the speed of float, all int8, `suggest` and `fastest`.
"""

BATCHES = 10
PIXELS = 128
SHAPES = {"r3d_18": (3, 8, 64, 64), "vit_b_16": (3, 224, 224)}
RESIZED = {"vit_b_16": {"image_size": 224}}
BASE = Size(768, 3072, 12, 2, words=50257, tokens=128, px=224, patch=16, mels=80, frames=1000)
SIZES = (1, 8)


@dataclass(frozen=True)
class Row:
    """One model; what is None could not be measured."""

    name: str
    mode: str = ""
    int8_share: float | None = None
    quantize: int | None = None
    dequantize: int | None = None
    sqnr_db: float | None = None
    speed: tuple[float | None, ...] = ()
    seconds: float | None = None
    why: str = ""


def models() -> dict[str, Written]:
    """All architectures by name, as large as they are in use."""
    return {**dict(_torchvision()), **WRITTEN, **transformers(BASE)}


def _torchvision() -> Iterator[tuple[str, Written]]:
    for name, known in TORCHVISION.items():
        shape = SHAPES.get(name, (3, PIXELS, PIXELS))
        used = replace(
            known, shape=(2, *shape), arguments={**known.arguments, **RESIZED.get(name, {})}
        )
        yield name, Written("torchvision", used.model, partial(_images, shape))


def _images(shape: tuple[int, ...], size: int) -> Tensor:
    return torch.randn(size, *shape)


def measure(name: str, written: Written, runs: int) -> Row:
    row = Row(name, why=written.missing() or "")
    if row.why:
        return row
    model = written.model()
    batches = written.batches(BATCHES + 1)
    held_out = batches.pop()
    example = batches[0]
    started = time.process_time()
    try:
        recipe = qrecipe.suggest(model, example, num_batches=BATCHES)
        row = replace(row, mode=(recipe.name or "").removeprefix("suggested-"))
        converted = qrecipe.quantize(model, recipe, batches, progress=False)
    except QRecipeError as error:
        return replace(row, why=first_finding(error))
    seconds = time.process_time() - started
    quantize, dequantize = boundaries(converted)
    with torch.no_grad():
        try:
            sqnr = output_sqnr_db(call(model, held_out), call(converted, held_out))
        except (RuntimeError, ValueError, TypeError):  # detections: as many boxes as there are
            sqnr = None
    return replace(
        row,
        int8_share=1 - flops(converted, example) / flops(model, example),
        quantize=quantize,
        dequantize=dequantize,
        sqnr_db=sqnr,
        speed=tuple(
            speed(model, again(converted, written.model()), written.batch(size), runs)
            for size in SIZES
        ),
        seconds=seconds,
    )


def first_finding(error: QRecipeError) -> str:
    finding = error.findings[0]
    return f"{finding.code}: {finding.message}"


def flops(model: nn.Module, batch: Any) -> int:
    """The multiplications and additions of float operations; quantized kernels are not counted."""
    torch.backends.mha.set_fastpath_enabled(False)  # it and fused attention are not counted
    # a nearest upsampling multiplies nothing, and of int8 tensors it cannot be decomposed
    nearest = torch.ops.aten.upsample_nearest2d
    nothing = dict.fromkeys((nearest.vec, nearest.default), lambda *_, **__: 0)
    counter = FlopCounterMode(display=False, custom_mapping=nothing)
    try:
        with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            call(model, batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops()


def boundaries(converted: nn.Module) -> tuple[int, int]:
    """How many quantize and dequantize calls all graphs of the model have."""
    targets = [
        node.target
        for module in converted.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
    ]
    return targets.count(torch.quantize_per_tensor), targets.count("dequantize")


def again(converted: nn.Module, architecture: nn.Module) -> nn.Module:
    """The converted model, never called: onednn is fastest for the shape of its first call."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        qrecipe.save_quantized(converted, file)
        return qrecipe.load_quantized(file, architecture)


def speed(model: nn.Module, converted: nn.Module, batch: Any, runs: int) -> float | None:
    """CPU time of float over int8; None if the converted model does not take the batch."""
    taken: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        try:
            for each in (model, converted):
                call(each, batch)
        except RuntimeError:
            return None
        for _ in range(runs):
            for each, times in zip((model, converted), taken, strict=True):
                started = time.process_time()
                call(each, batch)
                times.append(time.process_time() - started)
    return statistics.median(taken[0]) / statistics.median(taken[1])


def lines(rows: list[Row]) -> Iterator[str]:
    yield "| model | mode | int8 share | q/dq | SQNR (dB) | speed, batch 1 | batch 8 | seconds |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|"
    for row in rows:
        yield line(row)


def line(row: Row) -> str:
    if row.why:
        return f"| {row.name} | {row.mode} | {row.why} | | | | | |"
    speeds = ["-" if each is None else f"{each:.2f}" for each in row.speed]
    cells = [
        *(row.name, row.mode, f"{row.int8_share:.1%}", f"{row.quantize}/{row.dequantize}"),
        "-" if row.sqnr_db is None else f"{row.sqnr_db:.1f}",
        *speeds,
        f"{row.seconds:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def summary(rows: list[Row]) -> Iterator[str]:
    done = [row for row in rows if not row.why]
    yield f"{len(done)} of {len(rows)} models are quantized"
    for at, size in enumerate(SIZES):
        known = [(row.name, row.speed[at]) for row in done]
        slower = [name for name, ratio in known if ratio is not None and ratio < 1]
        refused = [name for name, ratio in known if ratio is None]
        ratios = [ratio for _, ratio in known if ratio is not None]
        if ratios:
            yield f"batch {size}: median float/int8 {statistics.median(ratios):.2f}"
        if slower:
            yield f"batch {size}: slower than float: {', '.join(slower)}"
        if refused:
            yield f"batch {size} is not taken by: {', '.join(refused)}"


def findings(rows: list[Row]) -> Iterator[str]:
    for each in summary(rows):
        yield f"- {each[0].upper()}{each[1:]}."


def cost_of_transforms(model: nn.Module, example: Any, runs: int) -> str:
    """How long `qrecipe.suggest` takes with the transforms that it tries, and without."""
    suggesting = "qrecipe.authoring.suggest.suggest.remedies"
    honest = importlib.import_module(suggesting.rpartition(".")[0]).remedies
    times: dict[Any, list[float]] = {honest: [], _no_remedies: []}
    for index in range(runs + 1):
        # take turns, because the second run finds warm caches
        for way in list(times) if index % 2 else reversed(list(times)):
            with mock.patch(suggesting, way):
                gc.collect()
                start = time.process_time()
                qrecipe.suggest(model, example)
            times[way].append(time.process_time() - start)
    pairs = list(zip(times[honest], times[_no_remedies], strict=True))[1:]
    ratio = statistics.median(a / b for a, b in pairs)
    return f"{ratio:.2f} times as long, {min(times[_no_remedies]):.2f} s without"


def _no_remedies(*_: Any) -> tuple[()]:
    return ()


def main() -> None:
    parser = argparse.ArgumentParser(description="Models as people write them.")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--only", nargs="*", default=())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--suggest", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen: Mapping[str, Written] = models()
    if arguments.only:
        chosen = {name: chosen[name] for name in arguments.only}
    rows: list[Row] = []
    for name, written in chosen.items():
        if arguments.suggest:
            cost = cost_of_transforms(written.model(), written.batch(1), arguments.runs)
            print(f"{name}: {cost}", flush=True)
            continue
        rows.append(measure(name, written, arguments.runs))
        print(line(rows[-1]), file=sys.stderr, flush=True)
    if arguments.suggest:
        return
    print("\n".join(lines(rows)))
    print("\n".join(["", *summary(rows)]))
    if arguments.page:
        PAGE.write_text("\n".join([INTRODUCTION, *lines(rows), "", *findings(rows)]) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
