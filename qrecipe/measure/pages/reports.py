"""The report pages: ranking, comparison, profile, drift, tuning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from qrecipe.execution.provenance import Provenance, origin_sections, stored_plan
from qrecipe.measure.compare.comparison import Comparison
from qrecipe.measure.drift.report import (
    DEFAULT_MAX_CLIPPED,
    DEFAULT_THRESHOLD,
    Drift,
    SiteDrift,
    drawn_move,
    moved_text,
)
from qrecipe.measure.pages import charts
from qrecipe.measure.pages.page import Figure, Page
from qrecipe.measure.profile.report import Profile
from qrecipe.measure.sensitivity.ranking import EFFECT, Ranking
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
    worst = report.sites[0]
    table, result = report._sections(threshold, max_clipped)
    farthest = f"The {worst.tensor} of {worst.name} would move furthest: {moved_text(worst)}."
    by_name = {f"{site.name} ({site.tensor})": site for site in report.sites}
    place = {name: index for index, name in enumerate(_site_names(origin))}
    in_depth = sorted(by_name, key=lambda name: (place.get(by_name[name].name, 0), name))
    series = {
        "stored range": {name: site.sqnr_db for name, site in by_name.items()},
        "range of today's data": {name: site.sqnr_after_db for name, site in by_name.items()},
    }
    moves = [100 * drawn_move(site) for site in report.sites]
    label = "how far recalibration moves the two ends (% of the stored width)"
    sections: list[Section] = [
        Text(result.title, (*result.text().splitlines(), farthest)),
        *_bars("Ranges by how far they would move", list(by_name), moves, label),
        *_line("SQNR along the depth of the network", in_depth, series, "SQNR (dB)"),
        *_spreads(report.sites, with_now=True),
        table,
    ]
    return page_about(f"Drift: {recipe_of(origin)}", sections, origin)


def comparison_page(report: Comparison, activations: Activations, origin: Provenance) -> Page:
    """The page about a float model and its quantized one."""
    table, result = report._sections()
    values = {
        site.name: site.activation.sqnr_db for site in report.sites if site.activation is not None
    }
    ranked = _worst_first("Sites by SQNR", values, "SQNR of the activation (dB)", origin)
    sections = [result, *ranked, *_worst_spreads(list(values), activations), table]
    return page_about(f"Comparison: {recipe_of(origin)}", sections, origin)


def ranking_page(ranking: Ranking, activations: Activations, origin: Provenance) -> Page:
    """The page that ranks sites by their effect on the output when quantized alone."""
    table, result = ranking._sections()
    values = ranking.values
    ranked = _worst_first("Ranking", values, ranking.label, origin)
    sections = [result, *ranked, *_worst_spreads(list(values), activations), table]
    if ranking.unranked:
        reasons = list(ranking.unranked.items())
        sections.append(Table("Sites without an error of their own", ("site", "why"), reasons))
    return page_about(f"Sensitivity: {recipe_of(origin)}", sections, origin)


def profile_page(profile: Profile, origin: Provenance) -> Page:
    """The page about the time of sites and boundaries."""
    *tables, result = profile._sections()
    shown = profile.sites[:MOST_BARS]
    drawing = charts.times(
        [site.name for site in shown],
        [1000 * site.float_time.seconds for site in shown],
        [1000 * site.int8_time.seconds for site in shown],
    )
    cut = "" if len(shown) == len(profile.sites) else f"The worst of {len(profile.sites)} sites."
    title = "Time of each site, the worst loss first"
    figure = Figure(title, drawing, f"milliseconds of {len(shown)} sites, float and int8", cut)
    return page_about(f"Profile: {recipe_of(origin)}", [result, figure, *tables], origin)


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
    weighed: Sequence[charts.Weighed] = (),
) -> Page:
    """The page about how a recipe was tuned, and the result.

    ``title`` names what was tuned; ``trials`` has the changes in order, each with its metric (NaN
    if it failed) and whether it was kept; ``notes`` says what was found; ``wanted`` is the metric
    to reach. ``weighed`` has the trials whose latency was measured. ``ranking`` has the sites,
    worst first, or says why there is none. ``origin`` is of the model that the tuned recipe gives.
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
    if weighed:
        drawing = charts.front(weighed, wanted, metric)
        alt = f"{metric} of {len(weighed)} trials over their latency"
        caption = "Each latency was measured in turns with the float model's."
        sections.append(Figure("Accuracy against latency", drawing, alt, caption))
    sections += [
        *_ranked(ranking, activations, origin),
        Table("Trials in order", ("trial", "change", metric, ""), rows, numeric=frozenset({0, 2})),
    ]
    return page_about(f"Tuning: {title}", sections, origin)


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
    yield from _worst_first("Ranking", values, EFFECT, origin)
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


def _worst_first(
    title: str, values: Mapping[str, float], label: str, origin: Provenance
) -> Iterator[Section]:
    """Values of sites from the worst, and in the order in which the model runs them."""
    yield from _bars(f"{title}, worst first", list(values), list(values.values()), label)
    names = [name for name in _site_names(origin) if name in values]
    yield from _line("Along the depth of the network", names, {label: values}, label)


def _line(
    title: str, names: Sequence[str], series: Mapping[str, Mapping[str, float | None]], label: str
) -> Iterator[Section]:
    found = {
        key: [math.nan if (value := by_name[name]) is None else value for name in names]
        for key, by_name in series.items()
    }
    if not any(math.isfinite(value) for line in found.values() for value in line):
        yield Text(title, ("There are no finite values to draw.",))
        return
    alt = f"{label} of {len(names)} tensors in the order in which they are computed"
    yield Figure(title, charts.along(names, found, label), alt, "Exact tensors have no point.")


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


def recipe_of(origin: Provenance) -> str:
    """The name of the recipe, for a title."""
    return stored_plan(origin).recipe


def page_about(title: str, sections: Sequence[Section], origin: Provenance) -> Page:
    """The sections, and at the end what the model was made by."""
    versions = origin.versions
    subtitle = (
        f"qrecipe {versions.get('qrecipe', '?')}, torch {versions.get('torch', '?')}; "
        f"recipe {origin.fingerprint[:12]}"
    )
    return Page(title, subtitle, [*sections, *origin_sections(origin)])
