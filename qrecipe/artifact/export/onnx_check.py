"""An ONNX file is run and compared with its model before it is written."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qrecipe.artifact.export.judged import Run, judged, unjudged
from qrecipe.audit.sample import RIGHT_DB
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import Finding
from qrecipe.errors.text import first_line
from qrecipe.model.nested import tensors_in

_CAUSE_DB = 6.0
"""How much worse the output must be at another batch size, if the size is to blame."""


def file_findings(content: bytes, run: Run) -> Iterator[Finding]:
    """Run a file in onnxruntime, if that is installed: QR414 if it is wrong, QR415 if it can't run.

    onnxruntime's optimizer is off: its fused kernels can saturate on a CPU without VNNI, which is
    not the file's fault.
    """
    if not _is_installed():
        return
    try:
        actual = _run(content, _given(run))
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
    found = _run(content, _given(run))
    expected = list(tensors_in(run.expected))
    if [each.shape for each in found] != [each.shape for each in expected]:
        return -math.inf
    return output_sqnr_db(expected, found)


def _is_installed() -> bool:
    return importlib.util.find_spec("onnxruntime") is not None


def _given(run: Run) -> list[Tensor]:
    return list(tensors_in(run.inputs.args))


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
