"""An ONNX file is run and compared with its model before it is written."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator

from torch import Tensor

from qrecipe.artifact.export.judged import Run, judged, unjudged
from qrecipe.audit.sample import RIGHT_DB
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import Finding
from qrecipe.errors.text import first_line
from qrecipe.model.nested import as_real, tensors_in
from qrecipe.runtimes.onnxruntime import open_as_written

_CAUSE_DB = 6.0
"""How much worse the output must be at another batch size, if the size is to blame."""


def file_findings(content: bytes, run: Run) -> Iterator[Finding]:
    """QR414 if a file is wrong in onnxruntime, if that is installed, and QR415 if it cannot run."""
    if not _is_installed():
        return
    try:
        actual = _run(content, run)
    except Exception as error:
        yield unjudged(f"onnxruntime cannot run it: {first_line(error)}")
        return
    yield from judged(run, actual, "onnxruntime")


def size_fault(content: bytes, own: Run, other: Run) -> str | None:
    """What is wrong with a file at another batch size and not at its own, in onnxruntime."""
    if not _is_installed():
        return None
    try:
        usual = _reached(content, own)
    except Exception:
        return None  # it is at fault at each size
    try:
        reached = _reached(content, other)
    except Exception as error:
        return f"onnxruntime cannot run it with another size: {first_line(error)}"
    if (
        reached is None
        or reached >= RIGHT_DB
        or (usual is not None and usual < reached + _CAUSE_DB)
    ):
        return None
    return f"with another size, it is {reached:.1f} dB from the model"


def _reached(content: bytes, run: Run) -> float | None:
    """How near a file is to the model in dB; minus infinity for results of other shapes."""
    found = _run(content, run)
    expected = [as_real(each) for each in tensors_in(run.expected)]
    if [each.shape for each in found] != [each.shape for each in expected]:
        return -math.inf
    return output_sqnr_db(expected, found)


def _is_installed() -> bool:
    return importlib.util.find_spec("onnxruntime") is not None


def _run(content: bytes, run: Run) -> list[Tensor]:
    return open_as_written(content).run(run.inputs)
