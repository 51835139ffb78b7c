"""The sections that only pages have: bars, figures, and how to read the page."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata
from typing import Literal

from qrecipe.terminal.report import escaped


@dataclass(frozen=True, slots=True)
class Bar:
    """A name, its value in words, and the length of each of its bars; not finite means none."""

    name: str
    words: str
    lengths: tuple[float, ...]

    @property
    def finite(self) -> tuple[float, ...]:
        """The lengths that are drawn."""
        return tuple(length if math.isfinite(length) else 0.0 for length in self.lengths)


def sqnr_bar(name: str, sqnr_db: float) -> Bar:
    """The SQNR of a site in words, and its error as the length; NaN for none."""
    words = "exact" if sqnr_db == math.inf else f"{sqnr_db:.1f}"
    return Bar(name, "none" if math.isnan(sqnr_db) else words, (relative_error(sqnr_db),))


def relative_error(sqnr_db: float) -> float:
    """The error that an SQNR stands for, as a share of the values; 0 where it is not finite."""
    return 10 ** (-sqnr_db / 20) if math.isfinite(sqnr_db) else 0.0


@dataclass(frozen=True, slots=True)
class Bars:
    """One bar for each name, or one for each of the ``kinds``; the first ``most`` are shown.

    ``length`` says what a bar's length is, ``words`` what its words are, if that is something else.
    """

    title: str
    bars: Sequence[Bar]
    length: str
    words: str = ""
    kinds: tuple[str, ...] = ()
    most: int = 40

    @property
    def label(self) -> str:
        """What is seen, in a phrase."""
        if self.words:
            return f"{self.words}; the bar is the {self.length}"
        return f"{self.length[:1].upper()}{self.length[1:]}"

    def text(self) -> str:
        return f"{self.label}: {len(self.bars)} bars"

    def html(self) -> str:
        shown = self.bars[: self.most]
        longest = max((length for bar in shown for length in bar.finite), default=0.0)
        rows = "\n".join(_row(bar, longest) for bar in shown)
        cut = "" if len(shown) == len(self.bars) else f" The first {self.most} of {len(self.bars)}."
        kinds = "".join(
            f' <span class="kind{place}">■</span> {escaped(kind)}'
            for place, kind in enumerate(self.kinds)
        )
        return (
            f'<p class="legend">{escaped(self.label)}{":" if kinds else ""}{kinds}.{cut}</p>\n'
            f'<ol class="bars">\n{rows}\n</ol>'
        )


def _row(bar: Bar, longest: float) -> str:
    shares = [100 * max(0.0, length) / longest if longest > 0 else 0.0 for length in bar.finite]
    tracks = "".join(
        f'<span class="track"><i class="kind{place}" style="width: {share:.2f}%"></i></span>'
        for place, share in enumerate(shares)
    )
    name, words = escaped(bar.name), escaped(bar.words)
    return f'<li><b>{name}</b><span class="value">{words}</span><span>{tracks}</span></li>'


Kind = Literal["sensitivity", "compare", "profile", "drift", "tune", "bench"]

_KINDS: Mapping[Kind, str] = {
    "sensitivity": "Each site is quantized alone, with all others in float, so that its error is "
    "its own. What it costs is how many dB the output gains without that error, if the errors of "
    "all sites add up. The longest bar is the largest error.",
    "compare": "Both models compute with their own values, so the error of an activation contains "
    "those of all sites before it. The longest bar is the largest error.",
    "profile": "The time of each site in float and in int8, measured in the same run. A site that "
    "loses time in int8 is better left float.",
    "drift": "A stored range was found by calibration. It still fits if calibrating with today's "
    "data would hardly move its two ends. The longest bar is the range that would move furthest.",
    "tune": "A trial quantizes the model by a changed recipe and evaluates it. The search keeps "
    "what helps until the wanted accuracy is reached.",
    "bench": "One recipe, executed by each runtime that is installed. The longest bar is the "
    "slowest.",
}

_WORDS: Mapping[str, str] = {
    "site": "what a rule decides: a module, a fused group of modules, or one call of a function",
    "quantized, passthrough, float": "computed in integers; only moves integers; computed in float",
    "q/dq boundary": "a tensor that is quantized or dequantized at run time: a pass over memory",
    "SQNR, dB": "signal-to-quantization-noise ratio; 20 dB more is a tenth of the error",
}


@dataclass(frozen=True, slots=True)
class Reading:
    """The explanation of a page of this kind."""

    kind: Kind
    title: str = "How to read this page"

    def text(self) -> str:
        return "\n".join([_KINDS[self.kind], *(f"{word}: {said}" for word, said in _WORDS.items())])

    def html(self) -> str:
        words = "".join(
            f"<dt>{escaped(word)}</dt><dd>{escaped(said)}</dd>" for word, said in _WORDS.items()
        )
        more = f"More: {_link(self.kind)}, {_link('reports')}, {_link('glossary')}."
        return f'<p>{escaped(_KINDS[self.kind])}</p>\n<dl class="terms">{words}</dl>\n<p>{more}</p>'


def _link(page: str) -> str:
    """The documentation's page: a link if the project says where its documentation is."""
    site = _documentation()
    if site is None:
        return f"docs/{page}.md in the repository"
    return f'<a href="{escaped(site.rstrip("/"))}/{page}.html">{page}</a>'


def _documentation() -> str | None:
    """The address under ``[project.urls]`` of the installed distribution."""
    try:
        urls = metadata("qrecipe").get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    named = dict(url.split(", ", 1) for url in urls)
    return named.get("Documentation")


@dataclass(frozen=True, slots=True)
class Drawing:
    """An SVG image; ``alt`` describes it in words."""

    svg: bytes
    alt: str

    def html(self) -> str:
        # a separate image: the ids inside one drawing cannot clash with those of another
        data = base64.b64encode(self.svg).decode()
        return f'<img alt="{escaped(self.alt)}" src="data:image/svg+xml;base64,{data}">'


@dataclass(frozen=True, slots=True)
class Figure:
    """One wide drawing, or small ones side by side as far as there is room for them."""

    title: str
    drawings: Sequence[Drawing]
    caption: str = ""

    def text(self) -> str:
        return "\n".join(drawing.alt for drawing in self.drawings)

    def html(self) -> str:
        images = "\n".join(drawing.html() for drawing in self.drawings)
        caption = f"\n<figcaption>{escaped(self.caption)}</figcaption>" if self.caption else ""
        box = "panels" if len(self.drawings) > 1 else "scroll"
        return f'<figure>\n<div class="{box}" tabindex="0">{images}</div>{caption}\n</figure>'
