"""qrecipe's file in ONNX Runtime and OpenVINO, next to the runtimes' own quantizers.

Four models: resnet18 and mobilenet_v2 of torchvision (random weights, warmed BatchNorm, 224
pixels), a U-Net (96 pixels), and a transformer encoder (4 layers of 384 features, 64 tokens). Each
is quantized by

- qrecipe, with the recipe below; also with results left float, for the encoder with float sums
- ``onnxruntime.quantization.quantize_static``: QDQ, weights per channel, min and max
- ``nncf.quantize`` of OpenVINO's model, with its defaults (for the encoder as a transformer)

with the same 80 inputs. Printed as Markdown tables, one for each model: milliseconds of CPU time of
one input in one thread, in turns, the median of --runs calls, each after one that does not count;
the ratio to the runtime's own quantizer; layers with weights or two operands that the runtime
computes in integers; SQNR in dB against float, on inputs that were not used for calibration.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/quantizers.py [--runs 31] [--only NAME ...]

--seven-bits leaves the eighth bit of qrecipe's activations unused, for CPUs without VNNI.
"""

from __future__ import annotations

import argparse
import logging
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from executors import Subject, encoder
from torch import Tensor, nn

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.model.call import Inputs
from qrecipe.planning.cpu import cpu_name
from qrecipe.runtimes.session import Session
from qrecipe.runtimes.table import RUNTIMES

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from corpus import TORCHVISION, _warm_batch_norm
from libraries import UNet

RECIPE = """
format = 1
extends = "{base}"
[tensor.weight]
quant_min = -127
quant_max = 127
[rules.module_type]
"torch.nn.AdaptiveAvgPool2d" = "float"
"torch.nn.LayerNorm" = "float"
[rules.function]
"torch.nn.functional.adaptive_avg_pool2d" = "float"
"""
FLOAT_SUMS = f'{RECIPE}"torch.add" = "float"\n'
INPUTS_ONLY = f"""{FLOAT_SUMS}
[tensor.activation]
observer = "mse"
inputs_only = true
"""
BATCHES, SIZE, JUDGED = 10, 8, 32

Runtime = Literal["onnxruntime", "openvino"]
Quantize = Callable[[nn.Module, Path, Sequence[Tensor]], Path]
"""A model, the file of the float model and batches, to a file."""


def unet() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = UNet()
    _warm_batch_norm(model, (4, 3, 96, 96))
    return model.eval()


SUBJECTS = {
    "resnet18": Subject(TORCHVISION["resnet18"].model, (3, 224, 224)),
    "mobilenet_v2": Subject(TORCHVISION["mobilenet_v2"].model, (3, 224, 224)),
    "unet": Subject(unet, (3, 96, 96)),
    "encoder": Subject(encoder, (64, 384)),
}


def float_file(model: nn.Module, path: Path, x: Tensor) -> Path:
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, external_data=False)
    return path


def by_qrecipe(recipe: str) -> Quantize:
    def quantize(model: nn.Module, source: Path, batches: Sequence[Tensor]) -> Path:
        parsed = qrecipe.parse_recipe(recipe)
        compiled = qrecipe.compile(
            model, parsed, batches[0][:1], executor="pt2e", target_cpu="vnni"
        )
        prepared = compiled.prepare()
        qrecipe.calibrate(prepared, batches, progress=False)
        file = source.with_name(f"qrecipe-{parsed.fingerprint[:8]}.onnx")
        qrecipe.export_onnx(compiled, prepared, file, dynamic_shapes=None)
        return file

    return quantize


def by_onnxruntime(model: nn.Module, source: Path, batches: Sequence[Tensor]) -> Path:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.given = iter([{name: x} for x in _items(batches)])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.given, None)

    name = _input_of(source)
    ready, file = source.with_name("ready.onnx"), source.with_name("onnxruntime.onnx")
    quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    quantization.quantize_static(
        str(ready),
        str(file),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        activation_type=quantization.QuantType.QUInt8,
    )
    return file


def by_nncf(kind: str | None) -> Quantize:
    def quantize(model: nn.Module, source: Path, batches: Sequence[Tensor]) -> Path:
        import nncf
        import openvino

        nncf.set_log_level(logging.ERROR)
        read = openvino.Core().read_model(source)
        items = _items(batches)
        how = {"model_type": nncf.ModelType(kind)} if kind else {}
        made = nncf.quantize(read, nncf.Dataset(items), subset_size=len(items), **how)
        file = source.with_name("nncf.xml")
        openvino.save_model(made, file, compress_to_fp16=False)
        return file

    return quantize


def _items(batches: Sequence[Tensor]) -> list[Any]:
    return [row[None].numpy() for batch in batches for row in batch]


def _input_of(file: Path) -> str:
    import onnx

    return str(onnx.load(file).graph.input[0].name)


@dataclass(frozen=True)
class Row:
    """A file in a runtime."""

    quantizer: str
    runtime: Runtime
    session: Session


OWN: Mapping[Runtime, str] = {"onnxruntime": "onnxruntime.quantization", "openvino": "nncf"}


def rows_of(name: str, subject: Subject, folder: Path, base: str) -> list[Row]:
    model = subject.model()
    batches = [subject.batch(SIZE, seed) for seed in range(BATCHES)]
    source = float_file(model, folder / "float.onnx", batches[0][:1])
    both: tuple[Runtime, ...] = ("onnxruntime", "openvino")
    quantizers: dict[str, tuple[Quantize, tuple[Runtime, ...]]] = {
        "float": (lambda model, source, batches: source, both),
        "qrecipe": (by_qrecipe(RECIPE.format(base=base)), both),
        "onnxruntime.quantization": (by_onnxruntime, both),
        "nncf": (by_nncf("transformer" if name == "encoder" else None), ("openvino",)),
    }
    inputs_only = by_qrecipe(INPUTS_ONLY.format(base=base))
    quantizers["qrecipe, inputs only"] = (inputs_only, both)
    if name == "encoder":
        quantizers["qrecipe, float sums"] = (by_qrecipe(FLOAT_SUMS.format(base=base)), both)
    return [
        Row(quantizer, runtime, RUNTIMES[runtime].open(file, 1))
        for quantizer, (quantize, runtimes) in quantizers.items()
        for file in [quantize(model, source, batches)]
        for runtime in runtimes
    ]


_LAYER = re.compile("Conv|Gemm|MatMul|FullyConnected|Deconvolution")


def layers(session: Session) -> str:
    found = [each for each in session.kernels() or () if _LAYER.search(each.operation)]
    return f"{sum(each.is_integer for each in found)} of {len(found)}"


def measure(name: str, runs: int, base: str) -> str:
    subject = SUBJECTS[name]
    with TemporaryDirectory() as folder:
        rows = rows_of(name, subject, Path(folder), base)
        x = subject.batch(JUDGED, BATCHES)
        with torch.no_grad():
            expected = subject.model()(x)
        decibels = [output_sqnr_db(expected, judged(row.session, x)) for row in rows]
        times = interleaved([row.session for row in rows], Inputs((x[:1],)), runs)
        counts = [layers(row.session) for row in rows]
    own = {
        row.runtime: each
        for row, each in zip(rows, times, strict=True)
        if row.quantizer == OWN[row.runtime]
    }
    lines = [
        f"| {name} | runtime | ms | to its own | int8 layers | dB |",
        "|---|---|---|---|---|---|",
    ]
    for row, mine, count, db in zip(rows, times, counts, decibels, strict=True):
        ratio = statistics.median(a / b for a, b in zip(mine, own[row.runtime], strict=True))
        milliseconds = statistics.median(mine) * 1000
        lines.append(
            f"| {row.quantizer} | {row.runtime} | {milliseconds:.2f} | {ratio:.2f} | {count} "
            f"| {db or 0:.1f} |"
        )
    return "\n".join(lines)


def judged(session: Session, x: Tensor) -> Tensor:
    return torch.cat([session.run(Inputs((row[None],)))[0].clone() for row in x])


def interleaved(sessions: Sequence[Session], inputs: Inputs, runs: int) -> list[list[float]]:
    """CPU seconds of one call of each, in turns.

    Each is called twice and the second call counts, so that none pays for caches that the one
    before it has filled with its own weights.
    """
    times: list[list[float]] = [[] for _ in sessions]
    for number in range(runs + 3):
        for own, session in zip(times, sessions, strict=True):
            session.run(inputs)
            started = time.process_time()
            session.run(inputs)
            if number > 2:
                own.append(time.process_time() - started)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="qrecipe next to the runtimes' own quantizers.")
    parser.add_argument("--runs", type=int, default=31)
    parser.add_argument("--only", nargs="*", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--seven-bits", action="store_true")
    options = parser.parse_args()
    base = f"builtin:x86-{'' if options.seven_bits else 'vnni-'}static-minmax"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    packages = ("torch", "onnxruntime", "openvino", "nncf")
    print(", ".join(f"{each} {version(each)}" for each in packages) + f", {cpu_name()}\n")
    for name in options.only:
        print(measure(name, options.runs, base) + "\n", flush=True)


if __name__ == "__main__":
    main()
