"""Plots of the reports, by matplotlib from the extra ``[report]``."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrecipe.errors.findings import Finding, QRecipeError
from qrecipe.errors.text import shown
from qrecipe.files import replace_file, why_not

if TYPE_CHECKING:
    from qrecipe.measure.compare.comparison import Comparison

_INCHES_A_SITE = 0.22
_MARGIN = 1.6


def plot_comparison(report: Comparison, path: str | os.PathLike[str]) -> None:
    """Two bar charts with one line per site: SQNR of its activation, share of the time."""
    names = [site.name for site in report.sites]
    figure = new_figure(11.0, _MARGIN + len(names) * _INCHES_A_SITE)
    quality, time = figure.subplots(1, 2, sharey=True)
    values = [math.nan if s.activation is None else s.activation.sqnr_db for s in report.sites]
    _bars(quality, names, values)
    quality.set_xlabel("SQNR of the activation (dB)")
    rows = range(len(names))
    float_shares = [100 * site.float_share for site in report.sites]
    int8_shares = [100 * site.quantized_share for site in report.sites]
    time.barh([row - 0.2 for row in rows], float_shares, 0.4, color="0.7", label="float")
    time.barh([row + 0.2 for row in rows], int8_shares, 0.4, color="C0", label="int8")
    time.set_xlabel("share of the time (%)")
    time.legend(loc="lower right")
    save(figure, path)


def plot_bars(
    names: Sequence[str], values: Sequence[float], label: str, path: str | os.PathLike[str]
) -> None:
    """One bar per name, from the top; non-finite values have none."""
    figure = new_figure(8.0, _MARGIN + len(names) * _INCHES_A_SITE)
    axes = figure.subplots()
    _bars(axes, names, values)
    axes.set_xlabel(label)
    save(figure, path)


def _bars(axes: Any, names: Sequence[str], values: Sequence[float]) -> None:
    finite = [value if math.isfinite(value) else 0.0 for value in values]
    axes.barh(range(len(names)), finite, 0.8, color="C0")
    axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)


def check_available() -> None:
    """Raises ``QRecipeError`` (QR602) if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise QRecipeError(
            Finding(
                "QR602",
                "plots need matplotlib: pip install 'qrecipe[report]'",
                hint="the table and JSON output work without it",
            )
        ) from None


def new_figure(width: float, height: float) -> Any:
    """An empty figure, sized in inches. Raises as `check_available` does."""
    check_available()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write the figure in the format of the suffix. Raises ``QRecipeError`` (QR421)."""
    name = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(name, str):
        text = f"plot takes a path, not {shown(type(path).__name__)}"
        raise QRecipeError(Finding("QR421", text))
    suffix = os.path.splitext(name)[1][1:]
    stream = BytesIO()
    try:
        figure.savefig(stream, format=suffix or "png")
        replace_file(Path(name if suffix else f"{name}.png"), stream.getvalue())
    except (OSError, ValueError) as error:
        raise QRecipeError(
            Finding(
                "QR421",
                f"cannot write the plot {shown(name)}: {why_not(error)}",
                hint="name a .png, .svg or .pdf file in an existing folder",
            )
        ) from None
