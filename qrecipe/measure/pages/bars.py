"""Bars in HTML: they fit any width, and their words can be read and copied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qrecipe.terminal.report import escaped


@dataclass(frozen=True, slots=True)
class Bar:
    """A name, its value in words, and the length of each of its bars; not finite means none."""

    name: str
    words: str
    lengths: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Bars:
    """One bar for each name, or one for each of the ``kinds``; the first ``most`` are shown."""

    title: str
    bars: Sequence[Bar]
    label: str
    kinds: tuple[str, ...] = ()
    most: int = 40

    def text(self) -> str:
        return f"{self.label}: {len(self.bars)} bars"

    def html(self) -> str:
        shown = self.bars[: self.most]
        longest = max((n for bar in shown for n in bar.lengths if math.isfinite(n)), default=0.0)
        rows = "\n".join(_row(bar, longest) for bar in shown)
        cut = "" if len(shown) == len(self.bars) else f" The first {self.most} of {len(self.bars)}."
        legend = "".join(
            f' <span class="kind{place}">■</span> {escaped(kind)}'
            for place, kind in enumerate(self.kinds)
        )
        return (
            f'<p class="legend">{escaped(self.label)}{legend}.{cut}</p>\n'
            f'<ol class="bars">\n{rows}\n</ol>'
        )


def _row(bar: Bar, longest: float) -> str:
    tracks = "".join(
        f'<span class="track"><i class="kind{place}" style="width: {_share(n, longest):.2f}%"></i>'
        "</span>"
        for place, n in enumerate(bar.lengths)
    )
    name, words = escaped(bar.name), escaped(bar.words)
    return f'<li><b>{name}</b><span class="value">{words}</span><span>{tracks}</span></li>'


def _share(length: float, longest: float) -> float:
    return 100 * length / longest if math.isfinite(length) and length > 0 else 0.0
