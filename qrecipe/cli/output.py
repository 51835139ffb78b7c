"""Output of the commands: on stdout, findings and warnings on stderr, and the files they write."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

import qrecipe
from qrecipe.cli.colour import write
from qrecipe.errors.findings import Finding, PlanError, QRecipeError, QRecipeWarning, in_full
from qrecipe.errors.text import printable
from qrecipe.files import check_replaceable_file, why_not
from qrecipe.terminal.report import plain

if TYPE_CHECKING:
    from qrecipe.planning.plan import Plan

FOUND_SOMETHING = 1
USAGE = 2

_NO_TORCH = Finding(
    "QR602",
    "this command needs torch: pip install 'qrecipe[cli]'",
    hint="check and show work without it",
)


def out(text: str) -> None:
    """Write text to stdout."""
    write(_fitted(printable(text), sys.stdout), sys.stdout)


def err(text: str) -> None:
    """Write text about what went wrong to stderr."""
    write(_fitted(printable(text), sys.stderr), sys.stderr)


_MESSAGE = re.compile(r"^(?:error: |warning: )?(?:\S+:\d+:\d+: )?QR\d{3} .*$", re.MULTILINE)


def _fitted(text: str, stream: TextIO) -> str:
    """The text; on a terminal the messages of findings are broken between words."""
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return _MESSAGE.sub(lambda message: _broken(message[0], width), text)


def _broken(message: str, width: int) -> str:
    lines = textwrap.wrap(
        message, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)


def hint(text: str | None) -> None:
    """Write what a person may want to know next to a terminal's stderr; nothing in a pipe."""
    if text is not None and sys.stderr is not None and sys.stderr.isatty():
        err(text)


def out_json(value: Any) -> None:
    """Write one JSON document to stdout; non-finite numbers become null."""
    print(json.dumps(plain(value), indent=2, allow_nan=False))


def show(result: Any, *, as_json: bool, plot: str | None = None, **more: Any) -> None:
    """Show what was measured, then plot it if a path is given; ``more`` is added to the JSON.

    It is shown before anything is written, which could fail.
    """
    if as_json:
        out_json({**plain(result), **more})
    else:
        out(str(result))
    if plot is not None:
        result.plot(plot)


def show_and_save(
    result: Any, key: str, path: str | None, save: Callable[[str], object], *, as_json: bool
) -> None:
    """Show what a search found, then save the recipe that came of it if a path is given.

    ``key`` has the path in the JSON.
    """
    show(result, as_json=as_json, **{key: path})
    if path is not None:
        save(path)
        if not as_json:
            out(f"\nwritten to {path}")


def show_plan(plan: Plan, *, as_json: bool, strict: bool) -> None:
    """Show a plan and an empty line, unless it becomes JSON; with ``strict``, exit on warnings."""
    if not as_json:
        out(f"{replace(plan, warnings=()) if strict else plan}\n")  # `fail_on` shows them
    if strict:
        fail_on(plan.warnings)


def fail_on(findings: Iterable[Finding]) -> None:
    """If there are warnings, show them as errors and exit."""
    found = list(findings)
    if found:
        sys.stdout.flush()
        err("\n".join(f"error: {text}" for text in in_full(found)))
        raise typer.Exit(FOUND_SOMETHING)


@contextmanager
def reported(*, as_json: bool, strict: bool = False) -> Iterator[None]:
    """Show the library's warnings and errors as plain lines, and exit after an error.

    A plan that failed is shown anyway; with ``as_json`` an error without a plan is shown as a
    document of its findings. With ``strict`` the first warning is an error. A missing torch is an
    error of the installation (QR602): commands import it only when they need it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "always", QRecipeWarning)
        warnings.showwarning = partial(_show_warning, warnings.showwarning)
        try:
            yield
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            _show_error(QRecipeError(_NO_TORCH), as_json=as_json)
            raise typer.Exit(USAGE) from None
        except QRecipeError as error:
            _show_error(error, as_json=as_json)
            is_missing = any(finding.code == "QR602" for finding in error.findings)
            raise typer.Exit(USAGE if is_missing else FOUND_SOMETHING) from None
        except QRecipeWarning as warning:
            err(f"error: {warning}")
            raise typer.Exit(FOUND_SOMETHING) from None


def _show_error(error: QRecipeError, *, as_json: bool) -> None:
    plan = error.plan if isinstance(error, PlanError) else None
    if plan is not None and plan.findings:
        out(plan.to_json() if as_json else f"{plan}\n")
    elif as_json:
        out_json({"findings": [finding.to_json() for finding in error.findings]})
    sys.stdout.flush()  # findings come last if both streams are one terminal
    err(str(error))


def _show_warning(
    otherwise: Callable[..., None], message: Warning | str, category: type[Warning], *details: Any
) -> None:
    if issubclass(category, QRecipeWarning):
        err(f"warning: {message}")
    else:
        otherwise(message, category, *details)


def check_outputs(
    outputs: Mapping[str, str | None],
    reads: Iterable[str] = (),
    *,
    force: bool,
    log: str | None = None,
) -> None:
    """`check_distinct`, then `check_free`; a ``log`` may exist."""
    check_distinct({"--log": log, **outputs}, reads)
    check_free(outputs, force=force)
    check_free({"--log": log}, force=True)


def check_distinct(outputs: Mapping[str, str | None], reads: Iterable[str] = ()) -> None:
    """Raise BadParameter if writing one of these files would overwrite another of them.

    ``outputs`` are paths by option, ``reads`` the files that the command reads.
    """
    taken = {_real(path): "it is read from there: name another file" for path in reads}
    for option, path in outputs.items():
        if path is None:
            continue
        real = _real(path)
        if real in taken:
            raise typer.BadParameter(f"{path}: {taken[real]}", param_hint=option)
        taken[real] = f"{option} already writes this file"


def check_free(outputs: Mapping[str, str | None], *, force: bool) -> None:
    """Raise BadParameter if a file cannot be written, or exists and is to be kept.

    A file that exists is only replaced with ``force``, unless it is empty.
    """
    for option, path in outputs.items():
        problem = None if path is None else _problem(path, force=force)
        if problem is not None:
            raise typer.BadParameter(f"{path}: {problem}", param_hint=option)


def files_of(recipe: str) -> list[str]:
    """The files that a recipe is made of; names of recipes that are in no file are among them.

    Raises what `qrecipe.load_recipe` raises.
    """
    return [each.name for each in qrecipe.load_recipe(recipe).ingredients]


def _problem(path: str, *, force: bool) -> str | None:
    try:
        check_replaceable_file(Path(path))
        is_in_the_way = os.path.lexists(path) and os.path.getsize(path) > 0
    except (OSError, ValueError) as error:
        return f"{why_not(error)}: name a file in an existing folder"
    if is_in_the_way and not force:
        return "it exists: name another file, or pass --force"
    return None


def _real(path: str) -> str:
    return os.path.realpath(path.replace("\0", ""))
