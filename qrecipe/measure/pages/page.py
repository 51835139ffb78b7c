"""A self-contained HTML page of figures, tables and text, without scripts or external files."""

from __future__ import annotations

import codecs
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qrecipe.errors.findings import QRecipeError
from qrecipe.errors.text import shown
from qrecipe.files import check_replaceable_file, failing_for, replace_file
from qrecipe.terminal.report import Section, escaped, report_html

_STYLE = Path(__file__).with_name("page.css")
_START = 1024


@dataclass(frozen=True, slots=True)
class Page:
    """A title, the conclusion, what the page is about by names, and sections in order."""

    title: str
    conclusion: str
    about: Mapping[str, str]
    sections: Sequence[Section]


def page_html(page: Page) -> str:
    """The page as an HTML5 document; all text is escaped."""
    title, style = escaped(page.title), _STYLE.read_text(encoding="utf-8")
    about = "\n".join(
        f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in page.about.items()
    )
    contents = " ".join(
        f'<a href="#part{place}">{escaped(section.title)}</a>'
        for place, section in enumerate(page.sections)
    )
    sections = "\n".join(
        f'<section id="part{place}">\n{report_html([section], "h2")}\n</section>'
        for place, section in enumerate(page.sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{title}</h1>\n<p class="conclusion">{escaped(page.conclusion)}</p>\n'
        f"<dl>\n{about}\n</dl>\n<nav>{contents}</nav>\n{sections}\n"
        "</main>\n</body>\n</html>\n"
    )


def save_page(page: Page, path: str | os.PathLike[str]) -> None:
    """Write the page atomically. Raises ``QRecipeError`` (QR431) if it cannot be written."""
    with failing_for(QRecipeError, "QR431", _cannot_write(path), _HINT):
        replace_file(Path(path), lambda stream: stream.write(page_html(page).encode()))


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises ``QRecipeError`` (QR431) early if no page can be written there.

    A file that is not a page is not overwritten either: a typo must not cost a model.
    """
    with failing_for(QRecipeError, "QR431", _cannot_write(path), _HINT):
        check_replaceable_file(Path(path))
        is_in_the_way = os.path.exists(path) and not _is_page(Path(path))
    if is_in_the_way:
        text = f"{_cannot_write(path)}: the file exists and is not an HTML page"
        raise QRecipeError.of("QR431", text, hint="name another file")


def _is_page(path: Path) -> bool:
    """Whether a file is empty or starts like HTML."""
    with path.open("rb") as stream:
        start = stream.read(_START)
    words = start.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    return not words or words.startswith((b"<!doctype html", b"<html", b"<!--"))


_HINT = "name a file in an existing folder"


def _cannot_write(path: str | os.PathLike[str]) -> str:
    return f"cannot write the report {shown(os.fspath(path))}"
