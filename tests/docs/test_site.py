"""The built documentation: its tables are tables, and it is seen on a desk and on a phone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from browser import LAYOUT, PHONE, SCHEMES, WIDE, needs_chromium, seen
from places import ROOT

import qrecipe

PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_the_rows_of_a_table_stand_below_its_header_without_a_gap(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip().splitlines()
        rows = [number for number, line in enumerate(lines) if line.startswith("|")]
        if rows:
            assert rows == list(range(len(lines))), block[:200]
            assert re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", lines[1]), block[:200]


# --- what the site takes from the project


def documentation():
    spec = spec_from_file_location("documentation", ROOT / "tools" / "documentation.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://host.example/owner/name.git", "https://host.example/owner/name"),
        ("https://user:token@host.example/owner/name", "https://host.example/owner/name"),
        ("git@host.example:owner/name.git", "https://host.example/owner/name"),
        ("ssh://git@host.example:2222/owner/name.git", "https://host.example/owner/name"),
        ("/a/folder", None),
        ("../qrecipe", None),
        ("file:///a/folder", None),
        ("", None),
    ],
)
def test_the_repository_is_where_the_clone_comes_from_if_that_has_an_address(remote, address):
    assert documentation().repository(remote) == address


# --- as it is seen


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    needs_chromium()
    if "SITE" in os.environ:
        return Path(os.environ["SITE"])
    folder = tmp_path_factory.mktemp("site")
    build(folder)
    return folder


def build(folder, **environment):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", folder]
    given = {**os.environ, "NO_MKDOCS_2_WARNING": "1", **environment}
    subprocess.run(command, cwd=ROOT, env=given, check=True)


SCROLLED = """(() => ({
  page: document.documentElement.scrollWidth,
  tables: document.querySelectorAll("main table").length,
  broken: [...document.querySelectorAll("main p")].filter(
    p => /^\\s*\\|/.test(p.textContent)).map(p => p.textContent.slice(0, 60)),
  header: document.querySelector(".md-header__topic").textContent.trim(),
  source: document.querySelector(".md-source")?.href ?? null,
  hidden: [...document.querySelectorAll("article *")].filter(element => {
    const style = getComputedStyle(element);
    return element.clientWidth > 0 && element.scrollWidth > element.clientWidth + 1 &&
      ["hidden", "clip"].includes(style.overflowX);
  }).map(element => element.className),
  moving: [...document.querySelectorAll("main pre > code, main .md-typeset__scrollwrap")].filter(
    element => element.scrollWidth > element.clientWidth + 1).map(element => {
      const style = getComputedStyle(element);
      return [style.overflowX, style.backgroundImage.includes("gradient")];
    }),
}))()"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_every_page_fits_and_what_is_wider_moves_visibly_in_its_box(width, site):
    for page in sorted(site.rglob("*.html")):
        if page.name == "404.html" or page.parent.name == "decisions":
            continue
        found = seen(page, width, "light", SCROLLED)
        assert found["page"] <= width, page.name
        assert found["broken"] == found["hidden"] == [], page.name
        assert all(way == ["auto", True] for way in found["moving"]), page.name


@pytest.mark.browser
def test_the_latencies_of_the_gallery_are_seen_without_moving_anything(site):
    moved = """[...document.querySelectorAll("main pre > code")].map(
      code => [code.textContent.includes("latency"), code.scrollWidth - code.clientWidth])"""
    blocks = seen(site / "gallery.html", WIDE, "light", moved)
    assert [beyond for shows, beyond in blocks if shows] == [0]


@pytest.mark.browser
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [WIDE, PHONE])
@pytest.mark.parametrize("page", ["index", "gallery", "reports"])
def test_nothing_of_a_page_is_cut_off_or_stands_beside_it(page, width, scheme, site, tmp_path):
    layout = seen(site / f"{page}.html", width, scheme, LAYOUT, tmp_path / "page.png")
    assert layout["width"] <= width
    assert layout["outside"] == layout["cut"] == layout["overlapping"] == []
    assert (sum(layout["paper"][:3]) < 3 * 64) is (scheme == "dark")


@pytest.mark.browser
def test_the_home_page_shows_the_version_and_where_to_go(site):
    found = seen(site / "index.html", WIDE, "light", SCROLLED)
    assert found["header"] == f"qrecipe {qrecipe.__version__}"
    rows = seen(
        site / "index.html", WIDE, "light", 'document.querySelectorAll("main tbody tr").length'
    )
    assert found["tables"] >= 1
    assert rows >= 20


@pytest.mark.browser
def test_a_clone_of_a_host_links_to_its_repository(tmp_path):
    needs_chromium()
    build(tmp_path, QRECIPE_REPOSITORY="git@host.example:owner/qrecipe.git")
    found = seen(tmp_path / "index.html", WIDE, "light", SCROLLED)
    assert found["source"] == "https://host.example/owner/qrecipe"
