"""OpenVINO, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from qrecipe.model.call import Inputs
from qrecipe.runtimes.session import Kernel, arrays_for, tensors


@dataclass(frozen=True, slots=True)
class OpenVinoSession:
    """An ``openvino.CompiledModel``, and one request of it."""

    compiled: Any
    request: Any

    def run(self, inputs: Inputs) -> list[Tensor]:
        given = arrays_for(inputs, len(self.compiled.inputs))
        found = self.request.infer(given, share_inputs=True)
        return tensors(found[output] for output in self.compiled.outputs)

    def kernels(self) -> tuple[Kernel, ...]:
        """The layers of the graph that OpenVINO runs on this CPU."""
        return tuple(_kernels(self.compiled.get_runtime_model()))


def open_file(source: Path | bytes, threads: int) -> OpenVinoSession:
    """A file of OpenVINO or ONNX, or the content of the latter.

    What stays float is computed in float32, also where the CPU has bfloat16, and no thread is tied
    to a core.
    """
    core = import_module("openvino").Core()
    is_content = isinstance(source, bytes)
    model = core.read_model(source, b"") if is_content else core.read_model(str(source))
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }
    return session_of(core.compile_model(model, "CPU", config))


def session_of(compiled: Any) -> OpenVinoSession:
    """The session of a compiled model."""
    return OpenVinoSession(compiled, compiled.create_infer_request())


_STORED = ("Const", "Input", "Output", "Reorder")


def _kernels(model: Any) -> Iterator[Kernel]:
    for layer in model.get_ordered_ops():
        info = {key: value.astype(str) for key, value in layer.get_rt_info().items()}
        if info["layerType"] not in _STORED:
            names = info["originalLayersNames"].split(",")
            # u8 or i8: that of what it reads
            is_integer = info["runtimePrecision"] in ("u8", "i8")
            yield Kernel(info["layerType"], is_integer, tuple(names))
