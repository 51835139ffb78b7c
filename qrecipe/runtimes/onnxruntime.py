"""ONNX Runtime, on the CPU."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from qrecipe.model.call import Inputs
from qrecipe.runtimes.session import Kernel, arrays_for, tensors

_PROVIDERS = ["CPUExecutionProvider"]


@dataclass(frozen=True, slots=True)
class OnnxRuntimeSession:
    """An ``onnxruntime.InferenceSession``; ``source`` is the file, or None if that is unknown."""

    session: Any
    source: str | bytes | None = None

    def run(self, inputs: Inputs) -> list[Tensor]:
        names = [given.name for given in self.session.get_inputs()]
        given = dict(zip(names, arrays_for(inputs, len(names)), strict=True))
        try:
            return tensors(self.session.run(None, given))
        except Exception as error:
            raise RuntimeError(_told(error)) from error

    def kernels(self) -> Sequence[Kernel] | None:
        """The nodes of the graph that ONNX Runtime has optimized for this CPU."""
        if self.source is None:
            return None
        with TemporaryDirectory() as folder:
            file, options = str(Path(folder) / "optimized.onnx"), _options(1)
            options.optimized_model_filepath = file
            import_module("onnxruntime").InferenceSession(self.source, options, _PROVIDERS)
            return tuple(_kernels(import_module("onnx").load(file).graph))


_KIND = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
_ADVICE = "Please fix either the inputs/outputs or the model."


def _told(error: Exception) -> str:
    """What an error says, in one line: the figures are in its later ones."""
    text = " ".join(str(error).split())
    return _KIND.sub("", text).removesuffix(_ADVICE).strip()


def open_file(source: Path | bytes, threads: int) -> OnnxRuntimeSession:
    """A file of ONNX, or its content."""
    given = source if isinstance(source, bytes) else str(source)
    made = import_module("onnxruntime").InferenceSession(given, _options(threads), _PROVIDERS)
    return OnnxRuntimeSession(made, given)


def open_as_written(content: bytes) -> OnnxRuntimeSession:
    """The content of a file, without optimization.

    Fused kernels can saturate on a CPU without VNNI, which is not the file's fault.
    """
    runtime, options = import_module("onnxruntime"), _options(0)
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return OnnxRuntimeSession(runtime.InferenceSession(content, options, _PROVIDERS))


def _options(threads: int) -> Any:
    options = import_module("onnxruntime").SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # its threads would wait busily for the next call, while others run
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_IN_INTEGERS = re.compile("QLinear|QGemm|QAttention|QEmbed|ConvInteger|MatMulInteger|DynamicQuant")
_TO_FLOAT = re.compile("DequantizeLinear|ToFloat|DynamicQuantizeMatMul|DynamicQuantizeLSTM")


def _kernels(graph: Any) -> Iterator[Kernel]:
    """Integers go through whatever reads them and is not known to give floats."""
    integers = set[str]()
    for node in graph.node:
        reads_integers = any(name in integers for name in node.input[:1])
        is_integer = reads_integers or _IN_INTEGERS.search(node.op_type) is not None
        gives_integers = is_integer and _TO_FLOAT.search(node.op_type) is None
        if gives_integers or node.op_type == "QuantizeLinear":
            integers.update(node.output)
        if node.op_type not in _CONVERSIONS:
            # of a fused node it makes a token of the graph's
            name = re.sub(r"_token_\d+$", "", node.name)
            yield Kernel(node.op_type, is_integer, (name,))
