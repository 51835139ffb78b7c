"""What recipes do to the accuracy of trained networks, without training.

Networks: the digits net of examples/digits as it is and with channels that differ up to 64 and
1,024 times (rescale.py), the reader of examples/cnn-lstm, a MobileNetV2 of a quarter of the width
that is trained here for half a minute, and the encoder of examples/digits, as it is and with
channels 32 times as large as the others. All of them see real digits.

    OMP_NUM_THREADS=1 python benchmarks/accuracy.py [--only NAME ...] [--nncf] [--aimet]

Printed as one Markdown table for each network: accuracy on the held-out set (1,000 digits; a
digit is 0.1 points); SQNR of the outputs for it in dB; CPU time to quantize, calibration and audit
included, as a multiple of the first recipe's. --nncf adds NNCF's own recipes, executed by OpenVINO;
it needs both. --aimet adds networks of convolutions that AIMET has equalized, quantized by the same
recipe as the first row, and by AIMET's simulation of 8 bits.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.planning.cpu import cpu_name

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "cnn-lstm"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))
import digits
import encoder
import read_digits
import rescale
import trained

OBSERVERS = ("minmax", "mean_minmax", "mse", "histogram")
ALPHAS = (0.3, 0.5, 0.7, 0.85)
ALL_BITS = "[tensor.activation]\nreduce_range = false\n"
FLOAT_SUMS = '[rules.function]\n"torch.add" = "float"\n'


@dataclass(frozen=True)
class Subject:
    """A network, what to quantize it with, and the recipes to try by name."""

    model: Callable[[], nn.Module]
    base: str
    recipes: Mapping[str, str]
    example: Any = digits
    inputs: Callable[[], Tensor] = lambda: digits.held_out_digits().images


def observed(name: str) -> str:
    return f'[tensor.activation]\nobserver = "{name}"\n'


def equalized(by: str) -> str:
    return f'[transform.equalize]\nby = "{by}"\n'


def smoothed(alpha: float | list[float]) -> str:
    return f"[transform.smooth]\nalpha = {alpha}\n"


def of_convolutions() -> dict[str, str]:
    return {
        **{name: observed(name) for name in OBSERVERS},
        "8 bits": ALL_BITS,
        **{f"equalize by {by}": equalized(by) for by in ("activations", "weights")},
        **{
            f"equalize by activations, {name}": equalized("activations") + observed(name)
            for name in ("mean_minmax", "mse")
        },
        "equalize by activations, 8 bits": equalized("activations") + ALL_BITS,
    }


def of_encoders() -> dict[str, str]:
    return {
        **{name: observed(name) for name in OBSERVERS},
        "8 bits": ALL_BITS,
        **{f"smooth, alpha {alpha}": smoothed(alpha) for alpha in ALPHAS},
        "smooth, the best alpha": smoothed(list(ALPHAS)),
        "float sums": FLOAT_SUMS,
        "float sums, smooth, the best alpha": smoothed(list(ALPHAS)) + FLOAT_SUMS,
        "float sums, smooth, mse": smoothed(list(ALPHAS)) + FLOAT_SUMS + observed("mse"),
        "float sums, smooth, 8 bits": smoothed(list(ALPHAS)) + FLOAT_SUMS + ALL_BITS,
    }


def stressed(spread: float) -> Callable[[], nn.Module]:
    return lambda: rescale.rescaled(digits.factory()[0], seed=0, spread=spread)


SUBJECTS = {
    **{
        f"digits, s = {spread}": Subject(stressed(spread), "builtin:x86-static", of_convolutions())
        for spread in (0, 3, 5)
    },
    "reader": Subject(
        lambda: read_digits.factory()[0],
        "builtin:cnn-lstm",
        of_convolutions(),
        read_digits,
        lambda: read_digits.strings(digits.held_out_digits(), 1000, seed=1).images,
    ),
    "MobileNetV2 x 0.25": Subject(
        lambda: trained.mobilenet(digits), "builtin:x86-static", of_convolutions()
    ),
    "encoder": Subject(lambda: encoder.factory()[0], "builtin:x86-static", of_encoders()),
    "encoder, 32 times": Subject(
        lambda: encoder.outlying(encoder.factory()[0]), "builtin:x86-static", of_encoders()
    ),
    "encoder, 32 times, dynamic": Subject(
        lambda: encoder.outlying(encoder.factory()[0]),
        "builtin:x86-dynamic",
        {f"smooth, alpha {alpha}": smoothed(alpha) for alpha in ALPHAS}
        | {"smooth, the best alpha": smoothed(list(ALPHAS))},
    ),
}


@dataclass(frozen=True)
class Row:
    """One recipe: accuracy, 0 to 1; SQNR in dB; CPU seconds to quantize."""

    name: str
    accuracy: float
    sqnr_db: float
    seconds: float


def rows(subject: Subject, model: nn.Module, others: Others) -> Iterator[Row]:
    inputs = subject.inputs()
    with torch.inference_mode():
        expected = model(inputs)
    batches = subject.example.calibration()
    qrecipe.quantize(model, subject.base, batches, progress=False)  # the first run pays for all
    for name, text in {"as it is": "", **subject.recipes}.items():
        recipe = qrecipe.parse_recipe(f'format = 1\nextends = "{subject.base}"\n{text}')
        start = time.process_time()
        converted = qrecipe.quantize(model, recipe, batches, progress=False)
        seconds = time.process_time() - start
        yield judged(name, converted, subject, inputs, expected, seconds)
    for name, quantize in others.items():
        start = time.process_time()
        try:
            quantized = quantize(batches)
        except Exception as error:
            print(f"{name}: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
            continue
        seconds = time.process_time() - start
        yield judged(name, quantized, subject, inputs, expected, seconds)


Others = Mapping[str, Callable[[Sequence[Tensor]], Any]]
"""How other libraries quantize a model, by name."""


def others(subject: Subject, model: nn.Module, names: Sequence[str]) -> Others:
    """Those of the named libraries, whose packages are no part of the tests'."""
    is_transformer = "smooth" in "".join(subject.recipes)
    found: dict[str, Callable[[Sequence[Tensor]], Any]] = {}
    if "nncf" in names and subject.base != "builtin:x86-dynamic":  # its activations are static
        import nncf_rows

        found |= nncf_rows.quantizers(model, is_transformer=is_transformer)
    if "aimet" in names and not is_transformer:
        import aimet_rows

        found |= aimet_rows.quantizers(model, subject.base)
    return found


def judged(
    name: str,
    converted: Any,
    subject: Subject,
    inputs: Tensor,
    expected: Tensor,
    seconds: float,
) -> Row:
    with torch.inference_mode():
        batches = torch.split(inputs, digits.BATCH_SIZE)
        found = torch.cat([converted(batch) for batch in batches])
    return Row(name, subject.example.evaluate(converted), sqnr_db(expected, found), seconds)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    for library in ("nncf", "aimet"):
        flag = f"--{library}"
        parser.add_argument(flag, action="append_const", const=library, dest="others", default=[])
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in options.only:
        subject = SUBJECTS[name]
        model = subject.model()
        print(f"\n{name}: float {subject.example.evaluate(model):.1%}, {subject.base}\n")
        print("| recipe | accuracy | SQNR | time |\n| --- | --- | --- | --- |")
        first = None
        for row in rows(subject, model, others(subject, model, options.others)):
            first = first or row.seconds
            figures = f"{row.accuracy:.1%} | {row.sqnr_db:.1f} dB | {row.seconds / first:.1f}"
            print(f"| {row.name} | {figures} |", flush=True)
        print(f"\n1.0 is {first:.1f} s of CPU time.")


if __name__ == "__main__":
    main(sys.argv[1:])
