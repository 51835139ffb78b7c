"""An ONNX file is run and compared with its model before it is written."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qrecipe.audit.sample import RIGHT_DB, TOLERANCE_DB
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import Finding
from qrecipe.errors.text import first_line
from qrecipe.model.nested import tensors_in

_FLIPPED = 0.01
"""The share of integers that may differ: ranks and thresholds flip at ties."""


_CAUSE_DB = 6.0
"""How much worse the output must be at another batch size, if the size is to blame."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What a file is given, and what it should return.

    ``as_float`` is the output of the float model, or None where that is unknown.
    """

    inputs: tuple[Any, ...]
    expected: Any
    as_float: Any


def file_findings(content: bytes, run: Run) -> Iterator[Finding]:
    """Run a file in onnxruntime, if that is installed: QR414 if it is wrong, QR415 if it can't run.

    onnxruntime's optimizer is off: its fused kernels can saturate on a CPU without VNNI, which is
    not the file's fault.
    """
    if not _is_installed():
        return
    tensors = list(tensors_in(run.expected))
    try:
        actual = _run(content, list(tensors_in(run.inputs)))
    except Exception as error:
        yield _unjudged(f"onnxruntime cannot run it: {first_line(error)}")
        return
    if len(actual) != len(tensors):
        yield _unjudged(f"it returns {len(actual)} tensors, the model {len(tensors)}")
        return
    reached = output_sqnr_db(tensors, actual)
    if reached is None:
        if not all(map(_mostly_equal, tensors, actual)):
            yield _wrong("different integers")
        return
    if reached >= RIGHT_DB:
        return
    if run.as_float is None:
        yield _unjudged(f"it is {reached:.1f} dB from the model, which may be rounding")
        return
    # depth amplifies single results that were rounded the other way
    floats = list(tensors_in(run.as_float))
    own, others = output_sqnr_db(floats, tensors), output_sqnr_db(floats, actual)
    if own is None or others is None or others >= own - TOLERANCE_DB:
        return
    yield _wrong(
        f"{reached:.1f} dB from the quantized model, and {others:.1f} dB from float (the model: "
        f"{own:.1f} dB)"
    )


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
    found = _run(content, list(tensors_in(run.inputs)))
    expected = list(tensors_in(run.expected))
    if [each.shape for each in found] != [each.shape for each in expected]:
        return -math.inf
    return output_sqnr_db(expected, found)


def _is_installed() -> bool:
    return importlib.util.find_spec("onnxruntime") is not None


def _run(content: bytes, given: Sequence[Tensor]) -> list[Tensor]:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    arrays = [tensor.detach().numpy() for tensor in given]
    found = session.run(None, dict(zip(names, arrays, strict=True)))
    return [torch.from_numpy(array) for array in found]


def _mostly_equal(expected: Tensor, actual: Tensor) -> bool:
    if expected.shape != actual.shape:
        return False
    return int((expected != actual).sum()) <= _FLIPPED * expected.numel()


def _wrong(what: str) -> Finding:
    return Finding(
        "QR414",
        f"the exported file gives different results in onnxruntime: {what}",
        hint="torch's exporter lost something: leave parts of the model float until the file "
        "is right, and report the model",
    )


def _unjudged(why: str) -> Finding:
    return Finding(
        "QR415",
        f"the exported file was not compared with the model: {why}",
        hint="run it where you will use it, on data with known results",
    )
