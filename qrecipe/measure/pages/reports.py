"""The report pages: ranking, comparison, drift, tuning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qrecipe.audit.sqnr import db_text, sqnr_text
from qrecipe.errors.text import counted
from qrecipe.execution.provenance import Provenance, origin_sections, stored_plan
from qrecipe.measure.compare.comparison import Comparison, comparison_table
from qrecipe.measure.drift.report import (
    DEFAULT_MAX_CLIPPED,
    DEFAULT_THRESHOLD,
    Drift,
    SiteDrift,
    drawn_move,
    drift_table,
    moved_text,
)
from qrecipe.measure.pages import charts
from qrecipe.measure.pages.page import Figure, Page
from qrecipe.measure.sensitivity.ranking import Ranking
from qrecipe.rules.resolution import listed
from qrecipe.terminal.report import Section, Table, Text

MOST_BARS = 40
MOST_SPREADS = 6

Activations = Drift | str
"""The activations, or why they are not available."""

Ranked = tuple[str, float, str]
"""A site, its SQNR in dB when quantized alone (NaN for none), and the same in words."""


def drift_page(
    report: Drift,
    origin: Provenance,
    threshold: float = DEFAULT_THRESHOLD,
    *,
    max_clipped: float = DEFAULT_MAX_CLIPPED,
) -> Page:
    """The page about stored ranges and today's data."""
    sites = report.sites
    worst = sites[0]
    summary = Text(
        "Result",
        (
            *report.summary(threshold, max_clipped),
            f"The {worst.tensor} of {worst.name} would move furthest: {moved_text(worst)}.",
        ),
    )
    sections: list[Section] = [
        summary,
        *_bars(
            "Ranges by how far they would move",
            [f"{site.name} ({site.tensor})" for site in sites],
            [100 * drawn_move(site) for site in sites],
            "how far recalibration moves the two ends (% of the stored width)",
        ),
        *_depth(
            "SQNR along the depth of the network",
            _in_depth(sites, origin),
            {"stored range": _sqnr, "range of today's data": _sqnr_after},
        ),
        *_spreads(sites, with_now=True),
        drift_table(sites),
    ]
    return _page(f"Drift: {_name(origin)}", sections, origin)


def comparison_page(report: Comparison, activations: Activations, origin: Provenance) -> Page:
    """The page about a float model and its quantized one."""
    sites = [site for site in report.sites if site.activation is not None]
    values = {site.name: site.activation.sqnr_db for site in sites if site.activation is not None}
    output = report.output
    summary = Text(
        "Result",
        (
            f"Output: {sqnr_text(None if output is None else output.sqnr_db)} "
            f"over {counted(report.batches, 'batch')}.",
            f"Quantizing and dequantizing takes {report.conversion_share:.1%} of the int8 time.",
        ),
    )
    label = "SQNR of the activation (dB)"
    sections: list[Section] = [
        summary,
        *_bars("Sites by SQNR, worst first", list(values), list(values.values()), label),
        *_named_depth(values, origin, label),
        *_worst_spreads(list(values), activations),
        comparison_table(report.sites),
    ]
    return _page(f"Comparison: {_name(origin)}", sections, origin)


def ranking_page(ranking: Ranking, activations: Activations, origin: Provenance) -> Page:
    """The page that ranks sites by their effect on the output when quantized alone."""
    by_db = ranking.float_value is None
    found = {site.name: site.sqnr_db if by_db else site.value for site in ranking.sites}
    values = {name: math.nan if value is None else value for name, value in found.items()}
    estimate = " (estimate)" if ranking.is_estimate else ""
    measure = "SQNR of the output (dB)" if by_db else "measure of the model"
    label = f"{measure} with this site alone quantized{estimate}"
    summary = [
        f"{counted(len(values), 'site')}, each quantized alone, "
        f"over {counted(ranking.batches, 'batch')}."
    ]
    if ranking.float_value is not None:
        summary.append(f"The float model reaches {ranking.float_value:.6g}.")
    if ranking.partial:
        summary.append("Interrupted: the ranking covers what was measured so far.")
    rows = [
        (
            str(place),
            site.name,
            site.op,
            db_text(values[site.name]) if by_db else f"{site.value:.6g}",
        )
        for place, site in enumerate(ranking.sites, 1)
    ]
    sections: list[Section] = [
        Text("Result", summary),
        *_bars("Ranking, worst first", list(values), list(values.values()), label),
        *_named_depth(values, origin, label),
        *_worst_spreads(list(values), activations),
        Table(
            "Ranking",
            ("place", "site", "operation", f"{'dB' if by_db else 'measure'} alone{estimate}"),
            rows,
            numeric=frozenset({0, 3}),
        ),
    ]
    if ranking.unranked:
        reasons = list(ranking.unranked.items())
        sections.append(Table("Sites without an error of their own", ("site", "why"), reasons))
    return _page(f"Sensitivity: {_name(origin)}", sections, origin)


def tune_page(
    title: str,
    trials: Sequence[tuple[str, float, bool]],
    *,
    notes: Sequence[str],
    wanted: float,
    ranking: Sequence[Ranked] | str,
    activations: Activations,
    origin: Provenance,
    metric: str,
) -> Page:
    """The page about how a recipe was tuned, and the result.

    ``title`` names what was tuned; ``trials`` has the changes in order, each with its metric (NaN
    if it failed) and whether it was kept; ``notes`` says what was found; ``wanted`` is the metric
    to reach. ``ranking`` has the sites, worst first, or says why there is none. ``origin`` is of
    the model that the tuned recipe gives.
    """
    kept = sum(1 for _, _, was_kept in trials if was_kept)
    rows = [
        (str(place), what, *_trial_cells(value, was_kept))
        for place, (what, value, was_kept) in enumerate(trials, 1)
    ]
    sections: list[Section] = [
        Text("Result", [*notes, f"Trials: {len(trials)}, of which the search kept {kept}."])
    ]
    points = [charts.Point(value, was_kept) for _, value, was_kept in trials]
    if any(math.isfinite(point.value) for point in points):
        drawing = charts.trials(points, wanted, metric)
        sections.append(Figure("Trials", drawing, f"{metric} of each of {len(points)} trials"))
    sections += [
        *_ranked(ranking, activations, origin),
        Table("Trials in order", ("trial", "change", metric, ""), rows, numeric=frozenset({0, 2})),
    ]
    return _page(f"Tuning: {title}", sections, origin)


def _trial_cells(value: float, was_kept: bool) -> tuple[str, str]:
    if math.isnan(value):
        return "none", "failed"
    return f"{value:.6g}", "kept" if was_kept else "not kept"


def _ranked(
    ranking: Sequence[Ranked] | str, activations: Activations, origin: Provenance
) -> Iterator[Section]:
    """The ranking that the search used, and the outcome for each site."""
    if isinstance(ranking, str):
        yield Text("Ranking, worst first", (f"Not available: {ranking}",))
        yield from _worst_spreads(_site_names(origin), activations)
        return
    values = {name: sqnr_db for name, sqnr_db, _ in ranking}
    label = "SQNR of the output with this site alone quantized (dB)"
    yield from _bars("Ranking, worst first", list(values), list(values.values()), label)
    yield from _named_depth(values, origin, label)
    verdicts = {site.name: site.verdict for site in stored_plan(origin)}
    left = [name for name in values if verdicts.get(name) == "float"]
    why = f"Float, so without a range: {listed(left)}." if left else ""
    yield from _worst_spreads(list(values), activations, why)
    rows = [
        (str(place), name, why, verdicts.get(name, ""))
        for place, (name, _, why) in enumerate(ranking, 1)
    ]
    header = ("place", "site", "what it costs", "in the tuned recipe")
    yield Table("Ranking", header, rows, numeric=frozenset({0}))


def _bars(
    title: str, names: Sequence[str], values: Sequence[float], label: str
) -> Iterator[Section]:
    """The worst as bars, or text if there is nothing to draw."""
    if not any(math.isfinite(value) for value in values):
        yield Text(title, ("There are no finite values to draw.",))
        return
    drawing = charts.bars(names[:MOST_BARS], values[:MOST_BARS], label)
    cut = f"The worst {MOST_BARS} of {len(names)}." if len(names) > MOST_BARS else ""
    unseen = [n for n, v in zip(names, values, strict=True) if not math.isfinite(v)][:MOST_BARS]
    note = f" Without a bar because they are not finite: {listed(unseen)}." if unseen else ""
    yield Figure(title, drawing, f"{label}, one bar for each site", f"{cut}{note}".strip())


def _named_depth(values: Mapping[str, float], origin: Provenance, label: str) -> Iterator[Section]:
    """Values of sites by name, in the order in which the model runs them."""
    names = [name for name in _site_names(origin) if name in values]
    yield from _line("Along the depth of the network", names, {label: values}, label)


def _in_depth(sites: Sequence[SiteDrift], origin: Provenance) -> list[SiteDrift]:
    place = {name: index for index, name in enumerate(_site_names(origin))}
    return sorted(sites, key=lambda site: (place.get(site.name, 0), site.tensor))


def _depth(title: str, sites: Sequence[SiteDrift], series: Mapping[str, Any]) -> Iterator[Section]:
    names = [f"{site.name} ({site.tensor})" for site in sites]
    values = {label: dict(zip(names, map(of, sites), strict=True)) for label, of in series.items()}
    yield from _line(title, names, values, "SQNR (dB)")


def _line(
    title: str, names: Sequence[str], series: Mapping[str, Mapping[str, float]], label: str
) -> Iterator[Section]:
    values = {key: [by_name[name] for name in names] for key, by_name in series.items()}
    if not any(math.isfinite(value) for line in values.values() for value in line):
        yield Text(title, ("There are no finite values to draw.",))
        return
    drawing = charts.along(names, values, label)
    alt = f"{label} of {len(names)} tensors in the order in which they are computed"
    yield Figure(title, drawing, alt, "Exact tensors have no point.")


def _worst_spreads(
    names: Sequence[str], activations: Activations, note: str = ""
) -> Iterator[Section]:
    """The tensors of the worst sites: their outputs if these have their own range.

    ``note`` names the sites without any.
    """
    if isinstance(activations, str):
        yield Text(_SPREADS, (f"Not available: {activations}",))
        return
    by_name: dict[str, SiteDrift] = {}
    for site in activations.sites:
        if site.name not in by_name or site.tensor == "output":
            by_name[site.name] = site
    shown = [by_name[name] for name in names if name in by_name]
    yield from _spreads(shown, with_now=False, note=note)


_SPREADS = "The worst activations and their quantization ranges"


def _spreads(sites: Sequence[SiteDrift], *, with_now: bool, note: str = "") -> Iterator[Section]:
    panels = [
        charts.Spread(
            f"{site.name} ({site.tensor}), {site.clipped:.2%} clipped",
            site.values,
            (site.stored.low, site.stored.high),
            (site.now.low, site.now.high) if with_now and site.now is not None else None,
        )
        for site in sites
        if site.values is not None
    ][:MOST_SPREADS]
    if not panels:
        words = ("None of these sites stores a range of its own.", note)
        yield Text(_SPREADS, [each for each in words if each])
        return
    alt = f"histograms of {len(panels)} tensors with their quantization ranges"
    caption = "Counts of float values, on a logarithmic scale, over the stored range (shaded)."
    yield Figure(_SPREADS, charts.spreads(panels), alt, f"{caption} {note}".rstrip())


def _site_names(origin: Provenance) -> list[str]:
    return [site.name for site in stored_plan(origin)]


def _name(origin: Provenance) -> str:
    return stored_plan(origin).recipe


def _page(title: str, sections: Sequence[Section], origin: Provenance) -> Page:
    """The sections, and at the end what the model was made by."""
    versions = origin.versions
    subtitle = (
        f"qrecipe {versions.get('qrecipe', '?')}, torch {versions.get('torch', '?')}; "
        f"recipe {origin.fingerprint[:12]}"
    )
    return Page(title, subtitle, [*sections, *origin_sections(origin)])


def _sqnr(site: SiteDrift) -> float:
    return math.nan if site.sqnr_db is None else site.sqnr_db


def _sqnr_after(site: SiteDrift) -> float:
    return math.nan if site.sqnr_after_db is None else site.sqnr_after_db
