"""How to read a page: its words explained on the page itself, and where to read more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata
from typing import Literal

from qrecipe.terminal.report import escaped

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
