"""Kills and full disks while files are written."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from faults import STATIC, Tally, in_child
from nets import NETS
from runs import silent
from tuning import alike, base, cancelling, closeness, full_loss

import qrecipe
from qrecipe.authoring.lock.file import write_lock
from qrecipe.authoring.tune.trials import ModelBench
from qrecipe.errors.findings import CODES
from qrecipe.measure.pages.page import save_page
from qrecipe.measure.pages.reports import comparison_page

Writer = Callable[[Path], object]


@dataclass(frozen=True)
class Kind:
    """A kind of file: two writers of two contents, and the file's name."""

    name: str
    file: str
    writers: tuple[Writer, Writer]


@cache
def kinds() -> list[Kind]:
    """All kinds of files that are written as a whole."""
    net = NETS["residual"]
    model, batches = net.model(), net.batches(3)
    minmax = "builtin:x86-static-minmax"
    recipes = [qrecipe.load_recipe(name) for name in (STATIC, minmax)]
    plans = [qrecipe.plan(model, recipe, batches[0]) for recipe in recipes]
    made = [qrecipe.quantize(model, recipe, batches, progress=False) for recipe in recipes]
    ranking = qrecipe.sensitivity(model, STATIC, batches, progress=False)
    report = qrecipe.compare(model, made[0], batches, progress=False)
    pages = [
        comparison_page(report, why, qrecipe.provenance(made[0]), {}) for why in ("no", "none")
    ]

    def two(write: Callable[[Any, Path], object], values: Any) -> tuple[Writer, Writer]:
        first, second = values
        return lambda path: write(first, path), lambda path: write(second, path)

    return [
        Kind("lock files", "net.lock.toml", two(write_lock, plans)),
        Kind("overlays", "overlay.toml", two(lambda n, p: ranking.save_overlay(p, n), (1, 2))),
        Kind("recipes", "saved.toml", two(lambda recipe, p: recipe.save(p), recipes)),
        Kind("HTML pages", "page.html", two(save_page, pages)),
        Kind("stored models", "net.safetensors", two(qrecipe.save_quantized, made)),
        Kind("plots", "plot.svg", two(lambda r, p: r.plot(p), (ranking, report))),
    ]


STAGES = {"before": "tempfile.mkstemp", "written": "os.chmod", "replacing": "os.rename"}

"""Where a process kills itself: at an audit event of Python's."""


def _kill_at(event: str, number: int) -> None:
    """Kill this process with SIGKILL at the so many-th audit event of that name."""
    left = number

    def hook(name: str, arguments: object) -> None:
        nonlocal left
        if name == event:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _kill_at_size(size: int) -> None:
    """Let the kernel kill this process when it writes beyond a size."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


KILLED = (-signal.SIGKILL, -signal.SIGXFSZ, -signal.SIGALRM)


def _kill_in(seconds: float) -> None:
    """Let the kernel kill this process after a time."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def kills(kind: Kind, times: int, random: Random, tally: Tally) -> None:
    """Kill processes that replace a file: it has the former content or the new one."""
    what = f"kill -9, {kind.name}"
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / kind.file
        contents = []
        for write in kind.writers:
            write(path)
            contents.append(path.read_bytes())
        while tally.tried[what] < times:
            stage = random.choice([*STAGES, "half", "any time"])
            write = kind.writers[contents[0] == path.read_bytes()]

            def killed(stage: str = stage, write: Writer = write) -> None:
                if stage == "half":
                    _kill_at_size(random.randrange(min(map(len, contents))))
                elif stage == "any time":
                    _kill_in(random.uniform(1e-4, 5e-3))
                else:
                    _kill_at(STAGES[stage], 1)
                while True:
                    write(path)

            code = in_child(killed)
            random.random()  # the child has drawn from its own copy
            left = [each for each in path.parent.iterdir() if each != path]
            problems = []
            if code not in KILLED:
                problems.append(f"at {stage}: ended with {code} instead of being killed")
            if path.read_bytes() not in contents and not _is_plot(path):
                problems.append(f"at {stage}: the file is neither the former nor the new one")
            tally.note(what, "in the midst of writing" if left else "before or after", *problems)
            for each in left:
                each.unlink()


def _is_plot(path: Path) -> bool:
    """Whether it is a whole plot; no two are equal."""
    return path.suffix == ".svg" and path.read_bytes().endswith(b"</svg>\n")


def killed_searches(times: int, random: Random, tally: Tally) -> None:
    """Kill searches while they write their log: each is resumed to the same result."""
    what = "kill -9, tune logs"
    model, batches = cancelling()
    evaluate = closeness(model, batches)
    options = {"max_drop": full_loss(model, batches, evaluate) / 2}

    def search(log: Path) -> qrecipe.TuningResult:
        with patch.object(ModelBench, "_priced", alike):  # a killed search may not have its times
            return qrecipe.tune(
                model, base(), batches, evaluate, resume=log, progress=silent, **options
            )

    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "log.json"
        whole = search(log)
        size, every = log.stat().st_size, _trials(log)
        while tally.tried[what] < times:
            log.unlink()
            stage = random.choice([*STAGES, "half"])
            number = random.randint(1, len(every) + 1)

            def killed(stage: str = stage, number: int = number) -> None:
                if stage == "half":
                    _kill_at_size(size * number // (len(every) + 2))
                else:
                    _kill_at(STAGES[stage], number)
                search(log)

            code = in_child(killed)
            problems = (
                [] if code < 0 else [f"at {stage} {number}: not killed, but ended with {code}"]
            )
            logged = _trials(log)
            if logged != every[: len(logged)]:
                problems.append(f"at {stage} {number}: the log is not a part of the whole search")
            result = search(log)
            if result.recipe.fingerprint != whole.recipe.fingerprint or _trials(log) != every:
                problems.append(f"at {stage} {number}: the resumed search found something else")
            for each in log.parent.iterdir():
                if each != log:
                    each.unlink()
            tally.note(
                what, "resumed with trials" if logged else "resumed from the start", *problems
            )


def _trials(log: Path) -> list[tuple[Any, ...]]:
    """What a log says of each trial, apart from how long it took."""
    if not log.exists():
        return []
    entries = json.loads(log.read_text())["trials"]
    times = ("seconds", "latency", "is_slower")
    return [tuple((k, str(v)) for k, v in sorted(e.items()) if k not in times) for e in entries]


def full_disks(kind: Kind, times: int, random: Random, tally: Tally) -> None:
    """Let the disk be full at any size: an error of ours, the former file, and nothing else."""
    what = f"disk full, {kind.name}"
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / kind.file
        first, second = kind.writers
        first(path)
        before = path.read_bytes()
        for attempt in range(times):
            size = random.randrange(len(before) // 2) if attempt else 0
            end, problems = "an error", []
            try:
                with _limited(resource.RLIMIT_FSIZE, size):
                    second(path)
                end = "written"
                problems.append(f"{size} bytes: there was no error")
            except qrecipe.QRecipeError as error:
                end = ", ".join(finding.code for finding in error.findings)
                if not all(finding.code in CODES for finding in error.findings):
                    problems.append(f"{size} bytes: {error}")
            except Exception as error:
                problems.append(f"{size} bytes: leaked {error!r}")
            if path.read_bytes() != before:
                problems.append(f"{size} bytes: the former file has changed")
            if len(list(path.parent.iterdir())) != 1:
                problems.append(f"{size} bytes: a temporary file is left")
            tally.note(what, end, *problems)


@contextmanager
def _limited(what: int, limit: int) -> Iterator[None]:
    former = resource.getrlimit(what)
    resource.setrlimit(what, (limit, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, former)
