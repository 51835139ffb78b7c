"""A page of the documentation as a session: its files are written, its code and commands run.

Blocks run in their order, in a folder with copies of ``examples/`` and ``recipes/``:

- ``python``, ``toml`` or ``yaml`` with ``title="NAME"`` is a file, which a later block has to use;
  ``toml`` without a title is a recipe that must be without errors;
- ``python`` runs, all blocks of a page in one namespace, and a ``text`` block after it is what it
  printed; where there is none, it must print nothing. The page names the code of each warning;
- ``console`` holds commands after ``$ `` and what they print; where nothing is shown, or nothing
  but ``...``, only the exit status counts. That is 0; 1 where the block shows a finding; or what a
  comment after the command says: ``# exit status 1``.

A line ``...`` stands for any lines, ``...`` in a line for any text. Numbers with a decimal point
may differ by one in their last place, as CPUs round differently; times, and ratios of times, by
anything. Columns of tables may have another width; lines of source with a caret may not.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import cache, partial
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import pytest
import tomli
import yaml
from command_line import invoke
from places import ROOT
from sybil import Document, Example, Region
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

import qrecipe
from qrecipe.registry import table as registered

GAP = "..."
_INFO = re.compile(r'(?P<language>[\w-]*)(?: title="(?P<title>[^"]+)")?[ \t]*\n')
_SHELL = set("|&;<>$`*?(){}~#")
_IN_PROCESS = re.compile(
    r"(?:PYTHONPATH=(?P<path>\w+) )?qrecipe (?P<words>.*?)(?: > (?P<target>[\w.]+))?", re.DOTALL
)
_NUMBER = r"\d+\.\d+"
_IMPORTS_TORCHVISION = re.compile(r"^import (?:torchvision|pytorch_lightning)\b", re.MULTILINE)
_TIME = (
    rf"(?:{_NUMBER}|\d+)(?: ± {_NUMBER})? (?:ms|s|min)\b"
    rf"|float/quantized = {_NUMBER}|\bwithin noise\b"
)
_PIECES = re.compile(
    rf"(?P<time>{_TIME})|(?P<version>{_NUMBER}(?:\.\d+)+)|(?P<number>{_NUMBER})|(?P<gap>\.\.\.)"
)
_STATUS = re.compile(r" +# exit status (\d)$")
_CODE = re.compile(r"\bQR\d{3}\b")
_SOURCE = re.compile(r"^ *\d* \| ")


class Session:
    """The folder, the names and the last output of one page."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="page-")).resolve()
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.printed = ""
        self.unused: set[str] = set()
        self._before = (Path.cwd(), list(sys.path), registered.snapshot())
        for name in ("examples", "recipes"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, self.folder / name, ignore=ignored)
        for name in ("tests", "tools"):  # what a page runs of these only reads
            (self.folder / name).symlink_to(ROOT / name)
        os.chdir(self.folder)
        sys.path.insert(0, str(self.folder))
        self._patches = pytest.MonkeyPatch()
        _shorten(self._patches)

    def close(self) -> None:
        """Everything as it was before: folder, paths, modules, registrations."""
        folder, sys.path[:], snapshot = self._before
        os.chdir(folder)
        registered.restore(snapshot)
        sys.modules["torch"].set_num_threads(1)
        self._patches.undo()
        self._forget_modules()
        shutil.rmtree(self.folder)

    def write(self, title: str, text: str) -> None:
        path = self.folder / title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if path.suffix == ".py":  # bytecode of a former text, perhaps of the same size and second
            Path(cache_from_source(str(path))).unlink(missing_ok=True)
        self._forget_modules()  # a module that was imported from the former text
        sys.modules.pop(path.stem, None)  # and one of that name that is another test's

    def run_python(self, source: str, line: int, page: str) -> set[str]:
        """Run it, keep what it prints, and give the codes of its warnings."""
        if _IMPORTS_TORCHVISION.search(source):
            from corpus import torchvision

            torchvision("models")  # some builds of torch need help with that
        caught = io.StringIO()
        code = compile("\n" * line + source, page, "exec")
        with redirect_stdout(caught), _plain_warnings(record=True) as shown:
            exec(code, self.names)
        self.printed = caught.getvalue()
        return {code for each in shown or () for code in _CODE.findall(str(each.message))}

    def command(self, text: str) -> tuple[str, int]:
        """What a command prints, and its exit status."""
        call = _IN_PROCESS.fullmatch(text.replace("\\\n", " "))
        if call and not _SHELL & set(call["words"]):  # without another start of torch
            return self._qrecipe(**call.groupdict())
        search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        finished = subprocess.run(
            ["bash", "-c", text],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env={**os.environ, "PATH": search},
        )
        return finished.stdout, finished.returncode

    def _qrecipe(self, path: str | None, words: str, target: str | None) -> tuple[str, int]:
        """A command of ours, with PYTHONPATH and its output in a file as a shell would have it."""
        with self._on_path(path) if path else nullcontext(), _plain_warnings():
            result = invoke(shlex.split(words))
        self._forget_modules()  # the next command is another process to the reader
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        if target is None:
            return result.output, result.exit_code
        (self.folder / target).write_text(result.stdout, encoding="utf-8")
        return result.stderr, result.exit_code

    @contextmanager
    def _on_path(self, path: str) -> Iterator[None]:
        """What is installed there is found; all else that is registered is of other processes."""
        *_, at_start = self._before
        ours = registered.snapshot()
        sys.path.insert(0, str(self.folder / path))
        registered.restore(at_start)
        importlib.invalidate_caches()
        try:
            yield
        finally:
            sys.path.remove(str(self.folder / path))
            registered.restore(ours)

    def _forget_modules(self) -> None:
        inside = f"{self.folder}{os.sep}"
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None)).startswith(inside):
                del sys.modules[name]


def _shorten(patches: pytest.MonkeyPatch) -> None:
    """Do less of what makes no difference: pages show no times, and all read the same digits."""
    import numpy as np
    from runs import hurry  # not at the top, as it imports torch

    hurry(patches)
    patches.setattr("qrecipe.measure.turns._MAX_RUNS", 5)
    patches.setattr("qrecipe.measure.compare.run._TIMED_RUNS", 1)
    patches.setattr(np, "loadtxt", partial(_table, np.loadtxt))


_tables: dict[int, Any] = {}


def _table(loadtxt: Callable[..., Any], lines: list[str], **options: Any) -> Any:
    """A table of numbers, parsed once however many commands read it."""
    key = hash((*lines, *options.items()))
    if key not in _tables:
        _tables[key] = loadtxt(lines, **options)
    return _tables[key].copy()


def open_session(names: dict[str, Any]) -> None:
    names["session"] = Session()


def close_session(names: dict[str, Any]) -> None:
    """The folder is gone even where the page has left something open, which is an error."""
    session: Session = names["session"]
    session.close()
    assert not session.printed, f"printed, and no text block shows it:\n{session.printed}"
    assert not session.unused, f"written, and no later block uses it: {sorted(session.unused)}"


def blocks(document: Document) -> Iterable[Region]:
    """Every fenced block of a page, whatever its language."""
    for region in RawFencedCodeBlockLexer(_INFO)(document):
        region.parsed = region.lexemes["source"]
        region.evaluator = evaluate
        yield region


def evaluate(example: Example) -> str | None:
    """What is wrong with a block, if anything."""
    session: Session = example.namespace["session"]
    language, title = (example.region.lexemes[key] for key in ("language", "title"))
    if session.printed and language != "text":
        return f"the Python before it prints what no text block shows:\n{session.printed}"
    source = str(example.parsed)
    session.unused = {name for name in session.unused if not _is_used(name, source)}
    if title:
        session.write(title, source)
        if Path(example.path).parent.name == "findings":  # where files are shown that are broken
            return None
        _check_syntax(title, source)
        if Path(title).suffix in (".py", ".toml") and not Path(title).name.startswith("."):
            session.unused.add(title)
        return None
    run = {
        "console": _console,
        "python": _python,
        "text": _text,
        "toml": _toml,
        "sh": _sh,
    }.get(language)
    if run is None:
        return f'no way is known to run a block of "{language}"'
    return run(session, example)


def _is_used(name: str, source: str) -> bool:
    """Whether a block names a file, or imports its module, or runs what its folder holds."""
    path = Path(name)
    words = {path.name, path.stem, *(str(each) for each in path.parents if each != Path())}
    return any(re.search(rf"\b{re.escape(word)}\b", source) for word in words)


def _check_syntax(title: str, text: str) -> None:
    suffix = Path(title).suffix
    if suffix in (".yaml", ".yml"):
        yaml.safe_load(text)
    if suffix == ".toml":
        tomli.loads(text)
    if suffix == ".py":
        compile(text, title, "exec")


def _python(session: Session, example: Example) -> str | None:
    codes = session.run_python(str(example.parsed), example.line, example.path)
    unnamed = sorted(code for code in codes if code not in example.document.text)
    return f"it warns, and the page does not say so: {', '.join(unnamed)}" if unnamed else None


def _text(session: Session, example: Example) -> str | None:
    printed, session.printed = session.printed, ""
    if not printed:
        return "a text block comes after the Python that prints it"
    return difference(str(example.parsed), printed)


def _toml(_: Session, example: Example) -> None:
    qrecipe.parse_recipe(str(example.parsed))


def _sh(_: Session, example: Example) -> str | None:
    """Commands that set up a machine: ``.ci/run`` takes them from the README."""
    if Path(example.path) == ROOT / "README.md":
        return None
    return "sh blocks are for the first commands of README.md: write console, with a prompt"


def _console(session: Session, example: Example) -> str | None:
    wrong = []
    for command, shown in commands(str(example.parsed)):
        said = _STATUS.search(command)
        printed, status = session.command(_STATUS.sub("", command))
        found = None if set(shown.split()) <= {GAP} else difference(shown, printed)
        allowed = {int(said[1])} if said else {0, 1} if _CODE.search(shown) else {0}
        if status not in allowed:
            found = f"exit status {status}\n{printed}"
        if found:
            wrong.append(f"$ {command}\n{found}")
    return "\n".join(wrong) or None


def commands(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with what is shown as its output."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        end = next(place for place, line in enumerate(lines) if not line.endswith("\\")) + 1
        yield "\n".join(lines[:end]), "\n".join(lines[end:]).strip("\n")


def difference(shown: str, printed: str) -> str | None:
    """None where a text is what was printed, gaps and tolerances allowed for."""
    expected = [_squeezed(line) for line in shown.strip("\n").splitlines()]
    got = [_squeezed(line) for line in printed.strip("\n").splitlines()]

    @cache
    def fits(place: int, start: int) -> bool:
        if place == len(expected):
            return start == len(got)
        if expected[place] == GAP:
            return any(fits(place + 1, end) for end in range(start, len(got) + 1))
        return (
            start < len(got) and _fits(expected[place], got[start]) and fits(place + 1, start + 1)
        )

    if fits(0, 0):
        return None
    return f"shown:\n{shown}\nprinted:\n{printed}"


def _squeezed(line: str) -> str:
    """A line, whatever the width of a table's columns; where a caret points stays as it is."""
    return line.rstrip() if _SOURCE.match(line) else re.sub(r"[ ─]+", " ", line).rstrip()


def _fits(shown: str, printed: str) -> bool:
    pattern, end = [], 0
    expected = []
    for piece in _PIECES.finditer(shown):
        pattern.append(re.escape(shown[end : piece.start()]))
        end = piece.end()
        if piece["time"]:
            pattern.append(f"(?:{_TIME})")
        elif piece["version"]:
            pattern.append(re.escape(piece["version"]))
        elif piece["number"]:
            pattern.append(rf"({_NUMBER})")
            expected.append(piece["number"])
        else:
            pattern.append(".*")
    match = re.fullmatch("".join(pattern) + re.escape(shown[end:]), printed)
    if match is None:
        return False
    return all(map(_near, match.groups(), expected))


def _near(got: str, shown: str) -> bool:
    last_place = 10.0 ** -len(shown.partition(".")[2])
    return abs(float(got) - float(shown)) <= 1.001 * last_place


@contextmanager
def _plain_warnings(record: bool = False) -> Iterator[list[warnings.WarningMessage] | None]:
    """Warnings as in a program of one's own, where tests make errors of them."""
    with warnings.catch_warnings(record=record) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("ignore", DeprecationWarning)
        yield caught
