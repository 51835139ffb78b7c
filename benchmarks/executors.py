"""What each executor makes of three models: speed, seconds of compiling, SQNR.

resnet18 and mobilenet_v2 of torchvision (random weights, warmed BatchNorm, 224 pixels), and a
transformer encoder (4 layers of 384 features, 64 tokens). For batch 1 and 8, in one thread:

- float: eager, and compiled by torch.compile
- FX: int8 kernels of torch, from FX graph mode
- Inductor: the program of PT2E, compiled with int8 kernels (`qrecipe.lower`)
- ExecuTorch: a ``.pte`` file with XNNPACK, float and int8, for this batch alone and for up to as
  many samples (skipped if it is not installed)

Printed as Markdown tables: CPU time of float eager over that of each, interleaved, the median of
--runs calls; CPU seconds of compiling, the C++ compiler included; SQNR in dB on a batch that was
not used for calibration.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/executors.py [--runs 15] [--only NAME ...]
        [--ways NAME ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import qrecipe
from qrecipe.artifact.export.pte import write_pte
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.planning.cpu import cpu_name

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from corpus import TORCHVISION

STATIC = "builtin:x86-static-minmax"
EXECUTORCH = f"""
format = 1
extends = "{STATIC}"
backend = "executorch"
executor = "pt2e"
[tensor.weight]
quant_min = -127
quant_max = 127
eps = 0.000244140625
[tensor.activation]
dtype = "int8"
reduce_range = false
eps = 0.000244140625
"""
WAYS = (
    "float, eager",
    "float, compiled",
    "FX, int8",
    "PT2E and Inductor, int8",
    "ExecuTorch, float",
    "ExecuTorch, int8",
    "ExecuTorch, int8, free batch",
)
BATCHES = 10
SIZES = (1, 8)

Run = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Subject:
    """A model, and the shape of one sample."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def batch(self, size: int, seed: int) -> Tensor:
        return torch.randn(size, *self.shape, generator=torch.Generator().manual_seed(seed))


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(384, 6, 1536, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()


SUBJECTS = {
    "resnet18": Subject(TORCHVISION["resnet18"].model, (3, 224, 224)),
    "mobilenet_v2": Subject(TORCHVISION["mobilenet_v2"].model, (3, 224, 224)),
    "encoder": Subject(encoder, (64, 384)),
}


@dataclass
class Row:
    """One way to run a model: by batch size, its speed and the seconds that it took to compile."""

    name: str
    speed: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    sqnr_db: float | None = None


def spent() -> float:
    """The CPU time of this process and of those that it waited for."""
    return sum(os.times()[:4])


def compiled_float(model: nn.Module, x: Tensor) -> Run:
    torch._dynamo.reset()
    made = torch.compile(model)
    made(x)
    return made


def inductor(program: nn.Module, x: Tensor) -> Run:
    torch._dynamo.reset()
    return qrecipe.lower(program, x)


def executorch(content: Path | bytes) -> Run:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(content)
    method = program.load_method("forward")
    return lambda x: (program, method.execute([x])[0])[1]


def executorch_float(model: nn.Module, x: Tensor) -> Run:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    exported = torch.export.export(model, (x,))
    edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
    return executorch(bytes(edge.to_executorch().buffer))


def executorch_int8(program: nn.Module, x: Tensor, sizes: Any) -> Run:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.pte"
        lowering = write_pte(program, file, x, sizes).lowering
        print(f"batch {len(x)}: {lowering}", file=sys.stderr)
        return executorch(file.read_bytes())


def ways(
    model: nn.Module, batches: Sequence[Tensor], wanted: Collection[str]
) -> dict[str, Callable[[Tensor], Run]]:
    """What compiles the model for an input, by name; what is quantized is so already."""

    def quantized(recipe: str | qrecipe.Recipe, executor: Any) -> nn.Module:
        return qrecipe.quantize(model, recipe, batches, executor=executor, progress=False)

    found: dict[str, Callable[[Tensor], Run]] = {
        "float, eager": lambda x: model,
        "float, compiled": lambda x: compiled_float(model, x),
    }
    if "FX, int8" in wanted:
        fx = quantized(STATIC, "fx")
        found["FX, int8"] = lambda x: fx
    if "PT2E and Inductor, int8" in wanted:
        program = quantized(STATIC, "pt2e")
        found["PT2E and Inductor, int8"] = lambda x: inductor(program, x)
    if importlib.util.find_spec("executorch") is not None:
        other = quantized(qrecipe.parse_recipe(EXECUTORCH), "pt2e")
        found["ExecuTorch, float"] = lambda x: executorch_float(model, x)
        found["ExecuTorch, int8"] = lambda x: executorch_int8(other, x, None)
        found["ExecuTorch, int8, free batch"] = lambda x: executorch_int8(other, x, "batch")
    return {name: made for name, made in found.items() if name in wanted}


def measure(subject: Subject, runs: int, wanted: Collection[str]) -> list[Row]:
    model = subject.model()
    found = ways(model, [subject.batch(8, seed) for seed in range(BATCHES)], wanted)
    rows = {name: Row(name) for name in found}
    for size in SIZES:
        x, made = subject.batch(size, BATCHES), dict[str, Run]()
        with torch.no_grad():
            for name, compiled in found.items():
                started = spent()
                try:
                    made[name] = compiled(x)
                except Exception as error:
                    print(f"{name}, batch {size}: {str(error).splitlines()[0]}", file=sys.stderr)
                    continue
                rows[name].seconds[size] = spent() - started
                rows[name].sqnr_db = output_sqnr_db(model(x), made[name](x))
            times = interleaved(made, x, runs)
        base = times["float, eager"]
        for name, own in times.items():
            ratios = [mine / other for mine, other in zip(base, own, strict=True)]
            rows[name].speed[size] = statistics.median(ratios)
    return list(rows.values())


def interleaved(made: dict[str, Run], x: Tensor, runs: int) -> dict[str, list[float]]:
    """CPU seconds of one call of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in made}
    for number in range(runs + 2):
        for name, run in made.items():
            started = time.process_time()
            run(x)
            if number > 1:
                times[name].append(time.process_time() - started)
    return times


def table(name: str, rows: Sequence[Row]) -> str:
    lines = [
        f"| {name} | speed, batch 1 | speed, batch 8 | s, batch 1 | s, batch 8 | dB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        speeds = [f"{row.speed[size]:.2f}" if size in row.speed else "" for size in SIZES]
        seconds = [f"{row.seconds[size]:.0f}" if size in row.seconds else "" for size in SIZES]
        db = "" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"
        lines.append("| " + " | ".join([row.name, *speeds, *seconds, db]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What each executor makes of a model.")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--only", nargs="*", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS)
    options = parser.parse_args()
    wanted = {WAYS[0], *options.ways}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {cpu_name()}\n")
    for name in options.only:
        print(table(name, measure(SUBJECTS[name], options.runs, wanted)) + "\n", flush=True)


if __name__ == "__main__":
    main()
