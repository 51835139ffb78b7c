"""Chromium without a window, for what can only be seen on a page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest

WIDTH = 1200
_QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
_MEASURE = """<script>
const boxes = [...document.querySelectorAll("figure img, table, pre, p, h1, h2")].map(e => {
  const r = e.getBoundingClientRect();
  return {tag: e.tagName, x: r.x, y: r.y, width: r.width, height: r.height,
          natural: e.naturalWidth ?? null};
});
document.body.setAttribute("data-layout", JSON.stringify(
  {width: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
   boxes}));
</script></body>"""


@dataclass(frozen=True)
class Layout:
    """The size of a document in pixels, and the boxes of what it shows."""

    width: int
    height: int
    boxes: list[dict]

    def figures(self):
        return [box for box in self.boxes if box["tag"] == "IMG"]


def chromium() -> str:
    """The program; skips the test where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no chromium here: apt-get install chromium")


def layout(page: Path, folder: Path, width: int = WIDTH) -> Layout:
    """How the page is laid out, by a copy of it that measures itself."""
    copy = folder / f"measured-{width}-{page.name}"
    copy.write_text(page.read_text().replace("</body>", _MEASURE))
    dom = _run(folder, f"--window-size={width},800", "--dump-dom", copy.as_uri())
    found = re.search('data-layout="([^"]*)"', dom)
    assert found, dom[-500:]
    return Layout(**json.loads(unescape(found[1])))


def screenshot(page: Path, folder: Path, height: int, width: int = WIDTH):
    """The whole page as an array of shape (height, width, 3)."""
    import numpy
    from PIL import Image

    image = folder / f"{page.stem}.png"
    _run(folder, f"--window-size={width},{height}", f"--screenshot={image}", page.as_uri())
    with Image.open(image) as opened:
        return numpy.asarray(opened.convert("RGB"))


def is_drawn(pixels):
    """Whether a region shows something: several colours, and not only a line at its edge."""
    inner = pixels[4:-4, 4:-4].reshape(-1, 3)
    return len({tuple(colour) for colour in inner[:: max(1, len(inner) // 20_000)]}) > 3


def _run(folder: Path, *arguments: str) -> str:
    profile = folder / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    command = [chromium(), *_QUIET, f"--user-data-dir={profile}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout
