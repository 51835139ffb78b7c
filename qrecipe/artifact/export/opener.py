"""A program that opens an exported file and runs it. It imports the file's runtime alone.

It is run as a script: ``opener.py RUNTIME FILE FOLDER``, with inputs and results in the folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

GIVEN, RESULTS = "given", "results"
"""The names of the files in the folder."""

_OPERATORS = "torch.ao.quantization.fx._decomposed"
"""Registers the operators that programs consist of when it is imported."""


def keep_arrays(path: Path, arrays: Sequence[Any]) -> None:
    import numpy

    with path.open("wb") as stream:
        numpy.savez(stream, *arrays)


def kept_arrays(path: Path) -> list[Any]:
    import numpy

    with numpy.load(path) as stored:
        return [stored[f"arr_{number}"] for number in range(len(stored.files))]


def _in_onnxruntime(file: str, folder: Path) -> None:
    onnxruntime: Any = import_module("onnxruntime")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    given = dict(zip(names, kept_arrays(folder / GIVEN), strict=True))
    keep_arrays(folder / RESULTS, session.run(None, given))


def _in_openvino(file: str, folder: Path) -> None:
    openvino: Any = import_module("openvino")
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(file, "CPU", config)
    found = compiled(kept_arrays(folder / GIVEN))
    keep_arrays(folder / RESULTS, [found[output] for output in compiled.outputs])


def _in_torch(file: str, folder: Path) -> None:
    import_module(_OPERATORS)
    torch: Any = import_module("torch")
    _called(torch.export.load(file).module(), folder)


def _in_inductor(file: str, folder: Path) -> None:
    torch: Any = import_module("torch")
    _called(torch._inductor.aoti_load_package(file), folder)


def _called(opened: Any, folder: Path) -> None:
    import torch
    from torch.utils import _pytree as pytree

    args, kwargs = torch.load(folder / GIVEN)
    with torch.no_grad():
        torch.save(pytree.tree_leaves(opened(*args, **kwargs)), folder / RESULTS)


def _in_executorch(file: str, folder: Path) -> None:
    method = import_module("executorch.runtime").Runtime.get().load_program(file).load_method

    def forward(*args: Any, **kwargs: Any) -> list[Any]:
        from torch.utils import _pytree as pytree

        return [
            each.clone() for each in method("forward").execute(pytree.tree_leaves((args, kwargs)))
        ]

    _called(forward, folder)


_OPENERS: Mapping[str, Callable[[str, Path], None]] = {
    "onnxruntime": _in_onnxruntime,
    "openvino": _in_openvino,
    "torch.export": _in_torch,
    "AOTInductor": _in_inductor,
    "executorch": _in_executorch,
}


if __name__ == "__main__":
    del sys.path[0]  # its own folder, whose modules have the names of the runtimes
    _OPENERS[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
