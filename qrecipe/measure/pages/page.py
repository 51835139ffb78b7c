"""A self-contained HTML page of figures, tables and text, without scripts or external files."""

from __future__ import annotations

import base64
import codecs
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qrecipe.errors.findings import QRecipeError
from qrecipe.errors.text import shown
from qrecipe.files import check_replaceable_file, replace_file, why_not
from qrecipe.terminal.report import Section, escaped, report_html


@dataclass(frozen=True, slots=True)
class Figure:
    """An SVG image; ``alt`` describes it in words."""

    title: str
    svg: bytes
    alt: str
    caption: str = ""

    def text(self) -> str:
        return self.alt

    def html(self) -> str:
        # a separate image: the ids inside one drawing cannot clash with those of another
        data = base64.b64encode(self.svg).decode()
        image = f'<img alt="{escaped(self.alt)}" src="data:image/svg+xml;base64,{data}">'
        caption = f"\n<figcaption>{escaped(self.caption)}</figcaption>" if self.caption else ""
        return f"<figure>\n{image}{caption}\n</figure>"


_START = 1024


@dataclass(frozen=True, slots=True)
class Page:
    """A title, a line below it, and sections in order."""

    title: str
    subtitle: str
    sections: Sequence[Section]


def page_html(page: Page) -> str:
    """The page as an HTML5 document; all text is escaped."""
    title, subtitle = escaped(page.title), escaped(page.subtitle)
    sections = report_html(page.sections, "h2")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{title}</h1>\n<p class="subtitle">{subtitle}</p>\n{sections}\n'
        "</main>\n</body>\n</html>\n"
    )


def save_page(page: Page, path: str | os.PathLike[str]) -> None:
    """Write the page atomically. Raises ``QRecipeError`` (QR431) if it cannot be written."""
    try:
        replace_file(Path(path), lambda stream: stream.write(page_html(page).encode()))
    except (OSError, ValueError) as error:
        raise _unwritable(path, why_not(error)) from None


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises ``QRecipeError`` (QR431) early if no page can be written there.

    A file that is not a page is not overwritten either: a typo must not cost a model.
    """
    try:
        check_replaceable_file(Path(path))
        is_in_the_way = os.path.exists(path) and not _is_page(Path(path))
    except (OSError, ValueError) as error:
        raise _unwritable(path, why_not(error)) from None
    if is_in_the_way:
        raise _unwritable(path, "the file exists and is not an HTML page")


def _is_page(path: Path) -> bool:
    """Whether a file is empty or starts like HTML."""
    with path.open("rb") as stream:
        start = stream.read(_START)
    words = start.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    return not words or words.startswith((b"<!doctype html", b"<html", b"<!--"))


def _unwritable(path: str | os.PathLike[str], why: str) -> QRecipeError:
    name = shown(os.fspath(path))
    hint = "name a file in an existing folder"
    return QRecipeError.of("QR431", f"cannot write the report {name}: {why}", hint=hint)


_STYLE = """\
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1b1f24;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.4rem 0 0.7rem; padding-bottom: 0.25rem; border-bottom: 1px solid #d5dae0;
  font-size: 1.15rem; }
p { margin: 0.4rem 0; overflow-wrap: anywhere; }
.subtitle { color: #57606a; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption, caption { color: #57606a; font-size: 0.87rem; text-align: left; }
figcaption { margin-top: 0.4rem; }
caption { padding-bottom: 0.4rem; }
table { width: 100%; border-collapse: collapse; font-size: 0.82rem; }
th, td { padding: 0.22rem 0.5rem; border-bottom: 1px solid #e4e8ec; text-align: left;
  vertical-align: top; }
.long { overflow-wrap: anywhere; }
th { border-bottom: 1px solid #8c959f; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
th.number { white-space: normal; }
pre { margin: 0; padding: 0.8rem 1rem; background: #f6f8fa; font-size: 0.82rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
@media print {
  main { max-width: none; padding: 0; }
  body { font-size: 10pt; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  thead { display: table-header-group; }
}
"""
