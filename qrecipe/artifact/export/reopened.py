"""A file is opened by its runtime in a fresh process, without qrecipe and the caller's code."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch

from qrecipe.artifact.export import opener
from qrecipe.artifact.export.judged import Run, judged, unjudged
from qrecipe.errors.findings import Finding
from qrecipe.errors.text import one_line
from qrecipe.errors.warn import settle
from qrecipe.runtimes.session import arrays, tensors

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
