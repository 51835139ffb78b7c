"""The Python code that the user names on the command line: loaded once, with our errors."""

from __future__ import annotations

import importlib
import importlib.util
import linecache
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import typer

from qrecipe.errors.findings import (
    CalibrationError,
    Finding,
    Location,
    PlanError,
    QRecipeError,
    error_from,
)
from qrecipe.errors.spelling import did_you_mean

_FORM = "write path/to/file.py:function or package.module:function"
_OF_INPUT = (
    "--input makes random float32 tensors of these shapes, batch dimension first; for token ids or "
    "other inputs, return (model, example_inputs) from the function of --model, without --input"
)
_OWN_FOLDER = Path(__file__).resolve().parents[1]
_NOTES = 12


@dataclass(frozen=True, slots=True)
class UserFunction:
    """A function of the user; an exception in a call becomes QR601 at the user's line."""

    name: str
    folder: Path
    function: Callable[..., Any]

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, *args: Any) -> Any:
        with _guarded(f"{self.name}()", self.folder, "QR601"):
            return self.function(*args)


@contextmanager
def user_code(plugins: Sequence[str] | None) -> Iterator[UserCode]:
    """The user's modules; the folders that they make importable stay so while inside.

    Imports the plugins first, for the observers and fake-quants that they register. Raises
    PluginError (QR152) where one cannot be imported.
    """
    former_path = list(sys.path)
    code = UserCode()
    try:
        with user_output():
            for plugin in plugins or ():
                code.module(plugin, "--plugin", "QR152")
        with _hints_for_command_line(code):
            yield code
    finally:
        sys.path[:] = former_path


class UserCode:
    """Modules by file or by name, each executed once.

    ``has_random_inputs``: the option --input takes the place of the user's example inputs.
    """

    def __init__(self) -> None:
        self.has_random_inputs = False
        self._by_file: dict[Path, ModuleType] = {}

    def function(self, name: str, option: str) -> UserFunction:
        """The function that ``name``, the value of ``option``, refers to.

        Raises QRecipeError (QR601) if its module fails, BadParameter if it does not exist.
        """
        module_name, _, attribute = name.rpartition(":")
        if not module_name or not attribute.isidentifier():
            text = f'"{name}" does not name a function: {_FORM}'
            raise typer.BadParameter(text, param_hint=option)
        module = self.module(module_name, option, "QR601")
        found = getattr(module, attribute, None)
        if found is None:
            public = [known for known in vars(module) if not known.startswith("_")]
            hint = did_you_mean(attribute, public)
            text = f'{module_name} has no "{attribute}"' + (f": {hint}" if hint else "")
            raise typer.BadParameter(text, param_hint=option)
        if not callable(found) or _is_module_instance(found):
            kind = type(found).__name__
            text = f"{name} is a {kind}: name a function that returns it"
            raise typer.BadParameter(text, param_hint=option)
        return UserFunction(attribute, Path(module.__file__ or "").resolve().parent, found)

    def module(self, name: str, option: str, code: str) -> ModuleType:
        """The module that ``name``, the value of ``option``, means; ``code`` is for its errors."""
        if name.endswith(".py") or "/" in name or os.sep in name:
            return self._load(Path(name), option, code)
        _make_importable(Path.cwd())
        with _guarded(f"importing {name}", _home(name), code):
            try:
                return importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                    raise
        text = f'there is no module "{name}", neither installed nor in this folder'
        raise typer.BadParameter(text, param_hint=option)

    def _load(self, path: Path, option: str, code: str) -> ModuleType:
        file = path.resolve()
        if file in self._by_file:
            return self._by_file[file]
        if not file.is_file():
            near = did_you_mean(file.name, [sibling.name for sibling in file.parent.glob("*.py")])
            text = f'there is no file "{path}"' + (f": {near}" if near else "")
            raise typer.BadParameter(text, param_hint=option)
        _make_importable(file.parent)
        with _guarded(f"loading {path}", file.parent, code):
            self._by_file[file] = _executed(file)
        return self._by_file[file]


def user_output() -> AbstractContextManager[object]:
    """Redirect what the user's code prints: it is not part of the command's output."""
    return redirect_stdout(sys.stderr)


@contextmanager
def _hints_for_command_line(code: UserCode) -> Iterator[None]:
    """Reword the library's hints about batches and inputs, which name Python arguments."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError([_without_forward(finding) for finding in error.findings]) from error
    except PlanError as error:
        if not code.has_random_inputs or error.findings[0].code != "QR307":
            raise
        raise error_from(replace(each, hint=_OF_INPUT) for each in error.findings) from error


def _without_forward(finding: Finding) -> Finding:
    if finding.hint is None or "forward=" not in finding.hint:
        return finding
    fault, _, call = finding.hint.rpartition("pass forward=lambda model, batch: model(")
    hint = "let the function of --data return the model's inputs only, without labels"
    if fault and call.endswith(")") and "labels" not in fault:
        hint = f"{fault}let the function of --data return {call[:-1].lstrip('*')} for each batch"
    return replace(finding, hint=hint)


def _executed(file: Path) -> ModuleType:
    """The file as the module that ``import`` finds in its folder, so that class names agree.

    If another file has taken that name, the path is the name.
    """
    taken = sys.modules.get(file.stem)
    if taken is not None and getattr(taken, "__file__", None) == str(file):
        return taken
    name = file.stem if taken is None else str(file)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _make_importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _home(name: str) -> Path:
    """The folder of a module's outermost package."""
    spec = importlib.util.find_spec(name.partition(".")[0])
    origin = None if spec is None else spec.origin
    return Path.cwd() if origin is None else Path(origin).resolve().parent


def _is_module_instance(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


@contextmanager
def _guarded(what: str, folder: Path, code: str) -> Iterator[None]:
    """Turn what the user's code raises into a finding."""
    try:
        yield
    except QRecipeError:  # for example from a registration
        raise
    except (Exception, SystemExit) as error:
        first, *rest = str(error).strip().splitlines() or [""]
        text = f"{what} failed: {type(error).__name__}" + (f": {first}" if first else "")
        at, notes = _place(error, folder), tuple(rest[:_NOTES])
        is_relative = at is not None and at.source.lstrip().startswith("from .")
        hint = "name a file of a package as its module: package.module:function"
        given = hint if is_relative and isinstance(error, ImportError) else None
        raise error_from([Finding(code, text, at, given, notes=notes)]) from error


def _place(error: BaseException, folder: Path) -> Location | None:
    """The user's line that the error comes from: the innermost one in the user's folder."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return _location(error.filename, error.lineno)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.lineno and _is_users(Path(frame.filename), folder)]
    return _location(own[-1].filename, own[-1].lineno or 1) if own else None


def _is_users(file: Path, folder: Path) -> bool:
    if not file.is_relative_to(folder) or file.is_relative_to(_OWN_FOLDER):
        return False
    return "site-packages" not in file.relative_to(folder).parts  # a .venv next to the code


def _location(file: str, line: int) -> Location:
    source = linecache.getline(file, line).rstrip()
    indent = len(source) - len(source.lstrip())
    path = Path(file)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return Location(str(shown), line, indent + 1, max(len(source), indent + 1) + 1, source)
