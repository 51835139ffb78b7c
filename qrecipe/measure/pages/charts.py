"""The charts of the reports, by matplotlib from the extra ``[report]``: as SVG, or as files."""

from __future__ import annotations

import io
import math
import os
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qrecipe.errors.findings import QRecipeError
from qrecipe.errors.text import one_line, shown
from qrecipe.files import failing_for, path_text, replace_file
from qrecipe.measure.drift.distribution import Histogram
from qrecipe.measure.pages.sections import Bars

_WIDTH = 10.0
_PANEL = (4.1, 2.4)
_LONGEST_NAME = 44
_LONGEST_LINE = 30
_MOST_LABELS = 40

Ends = tuple[float, float]


Point = tuple[float, bool]
"""One trial: its result, and whether its change was kept."""

Weighed = tuple[float, float, bool]
"""One trial: its latency, its result, and whether no faster one is as accurate."""


_KINDS = {"int8": "#4c78a8", "float": "0.7"}
"""The colours of bars that stand beside each other."""


def plot_bars(charts: Sequence[Bars], path: str | os.PathLike[str]) -> None:
    """Bars from the top, and several charts of the same names side by side.

    Raises ``QRecipeError`` if matplotlib is missing (QR602) or the file cannot be written (QR421).
    """
    figure = _new_figure(_WIDTH, 0.9 + 0.24 * len(charts[0].bars))
    panels = figure.subplots(1, len(charts), sharey=True, squeeze=False)[0]
    for axes, chart in zip(panels, charts, strict=True):
        _draw_bars(axes, chart)
    _save(figure, path)


def _draw_bars(axes: Any, chart: Bars) -> None:
    places, kinds = range(len(chart.bars)), chart.kinds or ("int8",)
    height = 0.72 / len(kinds)
    for number, kind in enumerate(kinds):
        at = [place + height * (number - (len(kinds) - 1) / 2) for place in places]
        lengths = [bar.finite[number] for bar in chart.bars]
        axes.barh(at, lengths, height, color=_KINDS[kind], label=kind)
    names = [f"{bar.name} ({bar.words})" if chart.words else bar.name for bar in chart.bars]
    _label(axes.yaxis, places, names)
    axes.set_ylim(len(places) - 0.4, -0.6)
    if chart.kinds:
        axes.legend(loc="lower right")
    if not any(length for bar in chart.bars for length in bar.finite):
        axes.set_xlim(0, 1)
    label = f"{chart.length}; in brackets: {chart.words}" if chart.words else chart.length
    axes.set_xlabel(label, parse_math=False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def along(names: Sequence[str], series: Mapping[str, Sequence[float]], label: str) -> bytes:
    """One line per series over the names in order; non-finite values are left out."""
    longest = max(len(short_name(name)) for name in names)
    axes = _new_figure(_WIDTH, 3.4 + 0.07 * longest).subplots()
    for (name, values), style in zip(series.items(), _STYLES, strict=False):
        told = name if len(series) > 1 else None
        axes.plot(range(len(names)), list(map(_finite, values)), label=told, **style)
    shown = range(0, len(names), math.ceil(len(names) / _MOST_LABELS) or 1)
    _label(axes.xaxis, shown, [names[index] for index in shown])
    axes.tick_params(axis="x", rotation=90)
    axes.set_xlim(-0.6, len(names) - 0.4)
    return _finished(axes, label)


def _finished(axes: Any, label: str) -> bytes:
    fitting = textwrap.fill(one_line(label), _LONGEST_LINE, max_lines=3, placeholder=" …")
    axes.set_ylabel(fitting, parse_math=False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="best")
    return _svg(axes.figure)


_STYLES: Sequence[Mapping[str, Any]] = (
    {"color": "#4c78a8", "marker": "o", "markersize": 4, "linewidth": 1.4},
    {"color": "#e07b39", "marker": "s", "markersize": 3.5, "linewidth": 1.2, "linestyle": "--"},
)


def spread(title: str, values: Histogram, stored: Ends, now: Ends | None = None) -> bytes:
    """Counts of values on a logarithmic scale, with the quantization range behind them.

    ``now`` is the range that today's data would give, if that is to be shown too.
    """
    axes = _new_figure(*_PANEL).subplots()
    counts, edges = values.counts, _edges(values)
    axes.axvspan(*stored, facecolor="#d9e4f0", edgecolor="#4c78a8")
    axes.stairs(counts, edges, fill=True, color="#5a6570")
    if now is not None:
        for end in now:
            axes.axvline(end, color="#e07b39", linestyle="--", linewidth=1.4)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, max(counts) * 2)
    low = min(edges[0], stored[0], *(now or ()))
    high = max(edges[-1], stored[1], *(now or ()))
    margin = 0.04 * (high - low) or 1.0
    axes.set_xlim(low - margin, high + margin)
    axes.set_title(short_name(title), fontsize=9, parse_math=False)
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", nbins=6)
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(axes.figure)


def trials(points: Sequence[Point], target: float, label: str) -> bytes:
    """The metric of each trial in order; filled if it was kept, a cross if it failed."""
    axes = _new_figure(_WIDTH, 3.6).subplots()
    steps = range(1, len(points) + 1)
    values = [_finite(value) for value, _ in points]
    axes.plot(steps, values, color="#bbbbbb", linewidth=1, zorder=1)
    for kept, name, face in ((True, "kept", "#4c78a8"), (False, "not kept", "#ffffff")):
        chosen = [
            (step, value)
            for step, (value, was_kept) in enumerate(points, 1)
            if was_kept is kept and math.isfinite(value)
        ]
        _scattered(axes, chosen, name, face)
    failed = [step for step, (value, _) in enumerate(points, 1) if not math.isfinite(value)]
    if failed:
        at_the_bottom = axes.get_xaxis_transform()
        heights = [0.03] * len(failed)
        axes.scatter(
            failed, heights, label="failed", marker="x", color="#b03030", transform=at_the_bottom
        )
    axes.axhline(target, color="#e07b39", linestyle="--", label="wanted")
    axes.set_xlabel("trial")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _finished(axes, label)


def front(points: Sequence[Weighed], target: float, label: str) -> bytes:
    """The metric of each trial over its latency, with a line through the front."""
    axes = _new_figure(_WIDTH, 3.6).subplots()
    best = sorted((latency, value) for latency, value, is_best in points if is_best)
    axes.plot(*zip(*best, strict=True), color="#4c78a8", linewidth=1, zorder=1)
    for on_front, name, face in ((True, "front", "#4c78a8"), (False, "other trials", "#ffffff")):
        chosen = [(latency, value) for latency, value, is_best in points if is_best is on_front]
        _scattered(axes, chosen, name, face)
    axes.axvline(1, color="#bbbbbb", label="the float model's latency")
    axes.axhline(target, color="#e07b39", linestyle="--", label="wanted")
    axes.set_xlabel("latency, as a multiple of the float model's")
    return _finished(axes, label)


def _scattered(axes: Any, points: Sequence[Ends], label: str, face: str) -> None:
    if points:
        columns = zip(*points, strict=True)
        axes.scatter(*columns, label=label, facecolor=face, edgecolor="#4c78a8", zorder=2)


def _edges(values: Histogram) -> list[float]:
    bins = len(values.counts)
    if values.low == values.high:
        half = abs(values.low) * 0.01 or 0.01
        return [values.low - half, values.high + half]
    step = (values.high - values.low) / bins
    return [values.low + index * step for index in range(bins + 1)]


def _label(axis: Any, positions: Sequence[int], names: Sequence[str]) -> None:
    axis.set_ticks(positions, [short_name(name) for name in names], fontsize=8, parse_math=False)


def short_name(name: str) -> str:
    """The name on one line; a long one keeps both ends, which tell sites apart."""
    text = one_line(name)
    half = _LONGEST_NAME // 2
    return text if len(text) <= _LONGEST_NAME else f"{text[: half - 1]}…{text[-half:]}"


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def check_available() -> None:
    """Raises ``QRecipeError`` (QR602) if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise QRecipeError.of(
            "QR602",
            "plots need matplotlib: pip install 'qrecipe[report]'",
            hint="the table and JSON output work without it",
        ) from None


def _new_figure(width: float, height: float) -> Any:
    """An empty figure, sized in inches. Raises as `check_available` does."""
    check_available()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write the figure in the format of the suffix. Raises ``QRecipeError`` (QR421)."""
    name = path_text(path, "plot takes a path", kind=QRecipeError, code="QR421")
    suffix = os.path.splitext(name)[1][1:]
    file = Path(name if suffix else f"{name}.png")
    what = f"cannot write the plot {shown(name)}"
    hint = "name a .png, .svg or .pdf file in an existing folder"
    with failing_for(QRecipeError, "QR421", what, hint):
        replace_file(file, lambda stream: figure.savefig(stream, format=suffix or "png"))


def _svg(figure: Any) -> bytes:
    from matplotlib import rc_context

    stream = io.BytesIO()
    # outlines need no fonts of the reader; without a date, equal reports are equal files
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "qrecipe"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        metadata = {"Date": None, "Creator": None}
        figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    return _coloured(stream.getvalue())


_DARK: Mapping[str, str] = {
    "#000000": "#d5dae0",
    "#ffffff": "#14181d",
    "#dddddd": "#323a44",
    "#bbbbbb": "#5a6570",
    "#cccccc": "#4a545f",
    "#4c78a8": "#7db0e8",
    "#e07b39": "#f0a05f",
    "#b03030": "#f07070",
    "#d9e4f0": "#223a55",
    "#5a6570": "#9aa7b4",
}
"""What takes the place of each colour where the reader prefers a dark page."""


def _coloured(svg: bytes) -> bytes:
    """The drawing with its colours as variables, which follow the colour scheme of the page."""
    text = svg.decode()
    used = [colour for colour in _DARK if f": {colour}" in text]
    for colour in used:
        text = text.replace(f": {colour}", f": var(--c{colour[1:]})")
    light = "".join(f"--c{colour[1:]}: {colour};" for colour in used)
    dark = "".join(f"--c{colour[1:]}: {_DARK[colour]};" for colour in used)
    style = (
        f"<style>svg {{ {light} fill: var(--c000000) }} "
        f"@media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    )
    return text.replace("<defs>", f"{style}\n<defs>", 1).encode()
