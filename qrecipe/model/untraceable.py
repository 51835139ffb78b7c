"""What a trace failed on, and at which line of the caller's code."""

from __future__ import annotations

import inspect
import linecache
import sysconfig
import traceback
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import nn

from qrecipe.errors.findings import Finding, TraceError
from qrecipe.errors.text import first_line
from qrecipe.model.call import Inputs, variadic
from qrecipe.model.unfit import hidden_modules


class UntraceableError(TraceError):
    """Tracing the part at ``path`` failed in the forward of the module ``at``.

    `proposals.with_advice` adds what to do about it.
    """

    def __init__(self, finding: Finding, path: str, at: str) -> None:
        super().__init__(finding)
        self.path, self.at = path, at


class AutocastError(Exception):
    """A call under ``torch.autocast``, which a graph would not keep."""


class BatchSizeError(Exception):
    """Python needs a number that follows from the batch size."""

    def __init__(self) -> None:
        super().__init__(
            "Python needs a number that follows from the batch size, to which a graph would be "
            "fixed; x.shape[0] can be computed with, but not x in a loop, len(), range() or int()"
        )


WITHOUT_AUTOCAST = (
    "remove torch.autocast from the model's code, and call the float model under it instead"
)
_NOT_INSTALLED = "module is not installed as a submodule"
_NOT_IN_A_GRAPH = "argument of type: "
_BETTER = {
    "cannot be interpreted as an integer": (
        "a value of the graph cannot be an index of a list, nor what range counts to; int() makes "
        "it one where it follows from the sizes of the inputs and not from the batch size"
    ),
    "AskingProxy'>": (
        "torch.vmap and the other transforms of torch.func take tensors, of which there are none "
        "while a graph is made; layers take a whole batch without them"
    ),
    "Proxy object cannot be iterated": (
        "a graph cannot loop over a tensor, whose length is the batch size, nor over what else may "
        "have another length"
    ),
}
"""What torch says, by how it ends, and what it means here."""


def untraceable(error: Exception, path: str, at: str, model: nn.Module) -> UntraceableError:
    """The error (QR305) for what a trace of the part at ``path`` raised in the module ``at``."""
    module = model.get_submodule(at)
    kind = type(module).__name__
    where = f'submodule "{at}" ({kind})' if at else f"the model's own forward ({kind})"
    inner = innermost_line(traceback.extract_tb(error.__traceback__), model)
    line = inner or _first_line_of(module.forward)
    place = f" at {line}" if line else ""
    if isinstance(error, AutocastError):
        what = f"{where} is called under torch.autocast{place}, which a graph does not keep"
        return UntraceableError(Finding("QR305", what, hint=WITHOUT_AUTOCAST), path, at)
    # the first sentence: torch goes on about what to read and to change in torch.fx
    why, hint = first_line(error).partition(". ")[0], None
    if why.startswith(_NOT_IN_A_GRAPH):
        kind = why.removeprefix(f"{_NOT_IN_A_GRAPH}<class '").removesuffix("'>").rpartition(".")[2]
        why = f"{'it passes' if inner else 'it returns'} a {kind}, which a graph cannot hold"
    why = next((better for torchs, better in _BETTER.items() if why.endswith(torchs)), why)
    hidden = hidden_modules(model) if why == _NOT_INSTALLED else None
    if hidden is not None:
        why, hint = hidden
    return UntraceableError(
        Finding("QR305", f"{where} cannot be traced{place}: {why}", hint=hint), path, at
    )


def check_named(model: nn.Module, path: str, inputs: Inputs) -> None:
    """Raises `UntraceableError` (QR305) if a forward is given some ``*args`` or ``**kwargs``."""
    module = model.get_submodule(path)
    name = variadic(module, inputs)
    if name is None:
        return
    whose = f'the forward of "{path}"' if path else "the model's forward"
    line = _first_line_of(module.forward)
    what = f"{whose} takes {name}{f' at {line}' if line else ''}, whose length tracing cannot know"
    hint = "give forward a named argument for each input"
    raise UntraceableError(Finding("QR305", what, hint=hint), path, path)


_NOT_THE_CALLERS = (Path(torch.__file__).parent, Path(__file__).parents[1])
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
_INSTALLED = ("site-packages", "dist-packages")


def innermost_line(frames: traceback.StackSummary, model: nn.Module) -> str | None:
    """The innermost line of the model's code in a traceback.

    Code of an installed package counts if it has the forward of one of the modules.
    """
    forwards = {_code(module.forward) for module in model.modules()}
    packages = {_package(Path(code.co_filename)) for code in forwards if code is not None}
    for frame in reversed(frames):
        path = Path(frame.filename)
        if frame.lineno is None or frame.filename.startswith("<"):  # code generated by FX
            continue
        if any(map(path.is_relative_to, _NOT_THE_CALLERS)):
            continue
        package = _package(path)
        if package in packages or package is None:
            return _shown(path, frame.lineno, frame.line)
    return None


def _package(path: Path) -> Path | None:
    """The installed package, or part of the standard library, that a file is in."""
    for folder in path.parents:
        if folder.name in _INSTALLED or folder == _STANDARD_LIBRARY:
            return folder / path.relative_to(folder).parts[0]
    return None


def _code(function: Any) -> CodeType | None:
    """The code of a function without its decorators."""
    return getattr(inspect.unwrap(function), "__code__", None)


def _first_line_of(function: Any) -> str | None:
    code = _code(function)
    return None if code is None else _shown(Path(code.co_filename), code.co_firstlineno, None)


def _shown(path: Path, number: int, line: str | None) -> str:
    here = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    text = linecache.getline(str(path), number) if line is None else line
    return f"{here}:{number} `{text.strip()}`"
