"""What an exported file computes, compared with the model that it was made from.

It is opened by its runtime in a fresh process, without qrecipe and the code of the caller.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from qrecipe.artifact.export import opener
from qrecipe.artifact.export.lowering import Lowering
from qrecipe.audit.sample import RIGHT_DB, TOLERANCE_DB
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import Finding
from qrecipe.errors.text import one_line
from qrecipe.errors.warn import settle
from qrecipe.model.call import Inputs
from qrecipe.model.nested import tensors_in
from qrecipe.runtimes.session import arrays, tensors

_FLIPPED = 0.01
"""The share of integers that may differ: ranks and thresholds flip at ties."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What a file is given, and what it should return.

    ``as_float`` is the output of the float model, or None where that is unknown.
    """

    inputs: Inputs
    expected: Any
    as_float: Any


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """A file that was written, by a run that it repeats, and what a compiler made of it."""

    run: Run
    lowering: Lowering | None = None


def judged(run: Run, actual: Sequence[Tensor], where: str) -> Iterator[Finding]:
    """QR414 if a file gives other results in a runtime, QR415 if that cannot be told."""
    tensors = list(tensors_in(run.expected))
    if len(actual) != len(tensors):
        yield unjudged(f"it returns {len(actual)} tensors, the model {len(tensors)}")
        return
    reached = output_sqnr_db(tensors, list(actual))
    if reached is None:
        if not all(map(mostly_equal, tensors, actual)):
            yield _wrong("different integers", where)
        return
    if reached >= RIGHT_DB:
        return
    if run.as_float is None:
        yield unjudged(f"it is {reached:.1f} dB from the model, which may be rounding")
        return
    # depth amplifies single results that were rounded the other way
    floats = list(tensors_in(run.as_float))
    own, others = output_sqnr_db(floats, tensors), output_sqnr_db(floats, list(actual))
    if own is None or others is None or others >= own - TOLERANCE_DB:
        return
    yield _wrong(
        f"{reached:.1f} dB from the quantized model, and {others:.1f} dB from float (the model: "
        f"{own:.1f} dB)",
        where,
    )


def mostly_equal(expected: Tensor, actual: Tensor) -> bool:
    if expected.shape != actual.shape:
        return False
    return int((expected != actual).sum()) <= _FLIPPED * expected.numel()


def unjudged(why: str) -> Finding:
    return Finding(
        "QR415",
        f"the exported file was not compared with the model: {why}",
        hint="run it where you will use it, on data with known results",
    )


def _wrong(what: str, where: str) -> Finding:
    return Finding(
        "QR414",
        f"the exported file gives different results in {where}: {what}",
        hint="torch's exporter lost something: leave parts of the model float until the file "
        "is right, and report the model",
    )


Opener = Literal["onnxruntime", "openvino", "torch.export", "AOTInductor", "executorch"]
"""What `opener` can open a file with."""

_OF_ARRAYS = ("onnxruntime", "openvino")


def check_reopened(how: Opener, file: Path, run: Run) -> None:
    """Run a file in a fresh process, and compare what it gives there.

    Raises ``AuditError``: it cannot be opened there (QR413), or gives other results (QR414). QR415
    warns if the runtime is not installed or the results cannot be compared.
    """
    settle(_findings(how, file, run), ())


def _findings(how: Opener, file: Path, run: Run) -> Iterator[Finding]:
    if how == "onnxruntime" and find_spec(how) is None:
        yield unjudged("onnxruntime is not installed")
        return
    with TemporaryDirectory() as folder:
        given = Path(folder) / opener.GIVEN
        if how in _OF_ARRAYS:
            opener.keep_arrays(given, arrays(run.inputs))
        elif not _kept((run.inputs.args, dict(run.inputs.kwargs)), given):
            yield unjudged("its inputs are containers that another process does not know")
            return
        done = subprocess.run(
            [sys.executable, opener.__file__, how, str(file.resolve()), folder],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        results = Path(folder) / opener.RESULTS
        if done.returncode or not results.exists():
            yield _died(how, done.returncode, done.stderr)
            return
        actual = tensors(opener.kept_arrays(results)) if how in _OF_ARRAYS else torch.load(results)
    yield from judged(run, actual, f"{how}, in a fresh process")


def _kept(value: object, path: Path) -> bool:
    """Store plain containers of tensors; others need code to be read back."""
    torch.save(value, path)
    try:
        torch.load(path)
    except pickle.UnpicklingError:
        return False
    return True


def _died(how: Opener, status: int, errors: str) -> Finding:
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "")
    why = (
        f"it was killed by signal {-status}" if status < 0 else one_line(last) or f"status {status}"
    )
    return Finding(
        "QR413",
        f"{how} cannot run the exported file in a fresh process: {why}",
        hint="export to another runtime, or leave parts of the model float until it can",
    )
