"""Exceptions that a plugin's observer or fake-quant has raised, reported as its own."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from torch import fx

from qrecipe._torch_ao import FakeQuantizeBase, ObserverBase
from qrecipe.audit.ranges import observed_tensor
from qrecipe.errors.findings import CalibrationError, Finding
from qrecipe.errors.text import first_line
from qrecipe.process.memory import raise_lack_of_memory

_LIBRARIES = ("torch.", "torchao.", "qrecipe.")


@contextmanager
def failing_observers_named() -> Iterator[None]:
    """Name the plugin's observer that has raised an exception inside the ``with``.

    Without it, the batch that was running or torch's conversion would be blamed; with torch's own
    observers, they are to blame. Raises ``CalibrationError`` (QR404).
    """
    try:
        yield
    except Exception as error:
        raise_lack_of_memory(error)
        finding = _finding(error)
        if finding is None:
            raise
        raise CalibrationError([finding]) from error


def _finding(error: BaseException) -> Finding | None:
    while (cause := error.__cause__) is not None:
        error = cause
    frames = list(traceback.walk_tb(error.__traceback__))
    owners = [frame.f_locals.get("self") for frame, _ in frames]
    observers = [each for each in owners if isinstance(each, (ObserverBase, FakeQuantizeBase))]
    own = [(frame, line) for frame, line in frames if _is_of_plugin(frame)]
    if not own:
        return None
    frame, line = own[-1]
    observer = frame.f_locals["self"]
    kind = "fake-quant" if isinstance(observer, FakeQuantizeBase) else "observer"
    parts = [each for each in owners if isinstance(each, fx.GraphModule)]
    names = (observed_tensor(part, each) for part in parts for each in observers)
    name = next(filter(None, names), None)
    of = f" of {name}" if name is not None else ""
    raised = f"{type(error).__name__}: {first_line(error)}"
    return Finding(
        "QR404",
        f"the {kind}{of} ({type(observer).__name__}) fails in {frame.f_code.co_name}: {raised}",
        hint=f"fix the {kind}, or name another one in the recipe",
        notes=(f"raised at {frame.f_code.co_filename}:{line}",),
    )


def _is_of_plugin(frame: FrameType) -> bool:
    """Whether a frame runs a method that a plugin's class has written itself."""
    is_observing = isinstance(frame.f_locals.get("self"), (ObserverBase, FakeQuantizeBase))
    return is_observing and not frame.f_globals["__name__"].startswith(_LIBRARIES)
