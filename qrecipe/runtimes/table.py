"""The runtimes that qrecipe knows: a row for each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, Literal

from qrecipe.errors.findings import QRecipeError
from qrecipe.process.threads import torch_threads
from qrecipe.runtimes import executorch, inductor, onnxruntime, openvino
from qrecipe.runtimes.session import ModuleSession, Session

Name = Literal["torch", "inductor", "executorch", "onnxruntime", "openvino"]


@dataclass(frozen=True, slots=True)
class Runtime:
    """How to use a runtime.

    ``check`` raises ``QRecipeError`` (QR602) if something is not installed, and says how to install
    it. ``open`` makes a session of a file, its content or a model, for a number of threads; where
    these are the process's, ``limited`` sets them for a moment.
    """

    title: str
    check: Callable[[], None]
    open: Callable[[Any, int], Session]
    limited: Callable[[int], AbstractContextManager[None]] = lambda threads: nullcontext()


def needing(title: str, extra: str, *packages: str) -> Callable[[], None]:
    """A check that raises ``QRecipeError`` (QR602) if a package of an extra is missing."""

    def check() -> None:
        missing = [name for name in packages if find_spec(name) is None]
        if missing:
            text = f"{title} needs {', '.join(missing)}: pip install 'qrecipe[{extra}]'"
            raise QRecipeError.of("QR602", text)

    return check


RUNTIMES: Mapping[Name, Runtime] = MappingProxyType(
    {
        "torch": Runtime(
            "torch", lambda: None, lambda module, threads: ModuleSession(module), torch_threads
        ),
        "inductor": Runtime(
            "torch.compile",
            inductor.check_compiler,
            inductor.opened,
            torch_threads,
        ),
        "executorch": Runtime(
            "ExecuTorch", executorch.check_installed, executorch.open_file, executorch.limited
        ),
        "onnxruntime": Runtime(
            "ONNX Runtime",
            needing("ONNX Runtime", "onnx", "onnx", "onnxscript", "onnxruntime"),
            onnxruntime.open_file,
        ),
        "openvino": Runtime(
            "OpenVINO",
            needing("OpenVINO", "openvino", "onnx", "onnxscript", "openvino"),
            openvino.open_file,
        ),
    }
)


def known_session(value: object) -> tuple[str, Session] | None:
    """A session of the caller's, in the runtime's own type, and its title; None for anything else.

    Nothing is imported: whoever has a session has imported its runtime.
    """
    for name, (kind, session_of) in _TYPES.items():
        module = sys.modules.get(name)
        if module is not None and isinstance(value, getattr(module, kind)):
            return RUNTIMES[name].title, session_of(value)
    return None


_TYPES: Mapping[Name, tuple[str, Callable[[Any], Session]]] = {
    "onnxruntime": ("InferenceSession", onnxruntime.OnnxRuntimeSession),
    "openvino": ("CompiledModel", openvino.session_of),
}
"""The runtimes' own types of sessions."""
