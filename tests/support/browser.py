"""Chromium without a screen, for what can only be seen on a page."""

from __future__ import annotations

import atexit
import functools
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import IO

import pytest

HEIGHT = 900
WIDE, PHONE = 1280, 390
SCHEMES = ("light", "dark")


def needs_chromium() -> None:
    """Skips the test where there is none."""
    if find_spec("PySide6") is None or find_spec("PySide6.QtWebEngineWidgets") is None:
        pytest.skip("no Chromium here: pip install -c constraints.txt -e '.[browser]'")


@functools.cache
def _window(scheme: str) -> tuple[subprocess.Popen, IO[str]]:
    """The process of a colour scheme, and what it complains about: a pipe could fill."""
    command = [sys.executable, str(Path(__file__).with_name("browser_window.py")), scheme]
    complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": complaints}
    window = subprocess.Popen(command, text=True, **pipes)
    atexit.register(window.kill)
    return window, complaints


def seen(page: Path, width: int, scheme: str, script: str, picture: Path | None = None):
    """What a script gives on a page in a window of this width, and a picture of the whole page."""
    window, complaints = _window(scheme)
    wish = {
        "page": str(page),
        "width": width,
        "height": HEIGHT,
        "script": script,
        "picture": None if picture is None else str(picture),
    }
    print(json.dumps(wish), file=window.stdin, flush=True)
    answer = window.stdout.readline()
    if not answer:
        complaints.seek(0)
        raise AssertionError(complaints.read()[-2000:])
    return json.loads(answer)


def pixels(picture: Path):
    """A picture as an array of shape (height, width, 3)."""
    import numpy
    from PIL import Image

    with Image.open(picture) as opened:
        return numpy.asarray(opened.convert("RGB"))


LAYOUT = (Path(__file__).with_name("layout.js")).read_text(encoding="utf-8")
"""Gives the widths of a page, its boxes, and what of it is cut off or hard to read."""
