"""The report pages: ranking, comparison, profile, drift."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from qrecipe.execution.provenance import Provenance, origin_sections, stored_plan
from qrecipe.measure.compare.comparison import Comparison
from qrecipe.measure.drift.report import (
    DEFAULT_MAX_CLIPPED,
    DEFAULT_THRESHOLD,
    Drift,
    SiteDrift,
    moved_text,
)
from qrecipe.measure.pages import charts, conclusions
from qrecipe.measure.pages.flow import PlanGraph
from qrecipe.measure.pages.page import Page
from qrecipe.measure.pages.sections import Bars, Drawing, Figure, Kind, Reading, sqnr_bar
from qrecipe.measure.profile.report import Profile
from qrecipe.measure.sensitivity.ranking import EFFECT, Ranking
from qrecipe.rules.resolution import listed
from qrecipe.terminal.report import Section, Table, Text

MOST_SPREADS = 6

Activations = Drift | str
"""The activations, or why they are not available."""

About = Mapping[str, str]
"""What was measured, by names as the user gave them: model, data, recipe or file."""

Ranked = tuple[str, float, str]
"""A site, its SQNR in dB when quantized alone (NaN for none), and the same in words."""


def drift_page(
    report: Drift,
    origin: Provenance,
    about: About,
    threshold: float = DEFAULT_THRESHOLD,
    *,
    max_clipped: float = DEFAULT_MAX_CLIPPED,
) -> Page:
    """The page about stored ranges and today's data."""
    worst = report.sites[0]
    table, result = report._sections(threshold, max_clipped)
    farthest = f"The {worst.tensor} of {worst.name} would move furthest: {moved_text(worst)}."
    by_name = {site.title: site for site in report.sites}
    place = {name: index for index, name in enumerate(_site_names(origin))}
    in_depth = sorted(by_name, key=lambda name: (place.get(by_name[name].name, 0), name))
    series = {
        "stored range": {name: site.sqnr_db for name, site in by_name.items()},
        "range of today's data": {name: site.sqnr_after_db for name, site in by_name.items()},
    }
    sections: list[Section] = [
        Text(result.title, (*result.text().splitlines(), farthest)),
        *report._bars(),
        *_line("SQNR along the depth of the network", in_depth, series, "SQNR (dB)"),
        *_spreads(report.sites, with_now=True),
        table,
    ]
    conclusion = conclusions.of_drift(report, threshold, max_clipped)
    return page_about("drift", "Drift", conclusion, sections, origin, about)


def comparison_page(
    report: Comparison, activations: Activations, origin: Provenance, about: About
) -> Page:
    """The page about a float model and its quantized one."""
    table, result = report._sections()
    values = {
        site.name: site.activation.sqnr_db for site in report.sites if site.activation is not None
    }
    errors, _ = report._bars()
    drawn = replace(errors, bars=[bar for bar in errors.bars if bar.name in values])
    sections = [result, *_ranked(drawn, values, activations, origin), table]
    conclusion = conclusions.of_comparison(report)
    return page_about("compare", "Comparison", conclusion, sections, origin, about)


def ranking_page(
    ranking: Ranking, activations: Activations, origin: Provenance, about: About
) -> Page:
    """The page that ranks sites by their effect on the output when quantized alone."""
    table, result = ranking._sections()
    (bars,) = ranking._bars()
    sections = [result, *_ranked(bars, ranking.values, activations, origin), table]
    if ranking.unranked:
        reasons = list(ranking.unranked.items())
        sections.append(Table("Sites without an error of their own", ("site", "why"), reasons))
    conclusion = conclusions.of_ranking(ranking)
    return page_about("sensitivity", "Sensitivity", conclusion, sections, origin, about)


def profile_page(profile: Profile, origin: Provenance, about: About) -> Page:
    """The page about the time of sites and boundaries."""
    *tables, result = profile._sections()
    sections = [result, *profile._bars(), *tables]
    conclusion = conclusions.of_profile(profile)
    return page_about("profile", "Profile", conclusion, sections, origin, about)


def ranked_sections(
    ranking: Sequence[Ranked] | str, activations: Activations, origin: Provenance
) -> Iterator[Section]:
    """The ranking that the search used, and the outcome for each site."""
    if isinstance(ranking, str):
        yield Text("Ranking, worst first", (f"Not available: {ranking}",))
        yield from _worst_spreads(_site_names(origin), activations)
        return
    values = {name: sqnr_db for name, sqnr_db, _ in ranking}
    bars = [sqnr_bar(name, value) for name, value in values.items()]
    drawn = Bars("Ranking, worst first", bars, "error", EFFECT)
    verdicts = {site.name: site.verdict for site in stored_plan(origin)}
    left = [name for name in values if verdicts.get(name) == "float"]
    why = f"Float, so without a range: {listed(left)}." if left else ""
    yield from _ranked(drawn, values, activations, origin, why)
    rows = [
        (str(place), name, why, verdicts.get(name, ""))
        for place, (name, _, why) in enumerate(ranking, 1)
    ]
    header = ("place", "site", "what it costs", "in the tuned recipe")
    yield Table("Ranking", header, rows, numeric=frozenset({0}))


def _ranked(
    bars: Bars,
    values: Mapping[str, float],
    activations: Activations,
    origin: Provenance,
    note: str = "",
) -> Iterator[Section]:
    """Sites by their values: the worst first, in the order of the model, and their activations."""
    if any(length for bar in bars.bars for length in bar.finite):
        yield bars
    else:
        yield Text(bars.title, (_NOTHING,))
    names = [name for name in _site_names(origin) if name in values]
    yield from _line("Along the depth of the network", names, {bars.words: values}, bars.words)
    yield from _worst_spreads(list(values), activations, note)


_NOTHING = "There are no finite values to draw."


def _line(
    title: str, names: Sequence[str], series: Mapping[str, Mapping[str, float | None]], label: str
) -> Iterator[Section]:
    found = {
        key: [math.nan if (value := by_name[name]) is None else value for name in names]
        for key, by_name in series.items()
    }
    if not any(math.isfinite(value) for line in found.values() for value in line):
        yield Text(title, (_NOTHING,))
        return
    alt = f"{label} of {len(names)} tensors in the order in which they are computed"
    drawing = Drawing(charts.along(names, found, label), alt)
    yield Figure(title, [drawing], "Exact tensors have no point.")


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
    drawn = [site for site in sites if site.values is not None][:MOST_SPREADS]
    if not drawn:
        words = ("None of these sites stores a range of its own.", note)
        yield Text(_SPREADS, [each for each in words if each])
        return
    panels = [_panel(site, with_now=with_now) for site in drawn]
    caption = "Counts of float values, on a logarithmic scale, over the stored range (shaded)."
    today = " The dashed lines are the range of today's data." if with_now else ""
    yield Figure(_SPREADS, panels, f"{caption}{today} {note}".rstrip())


def _panel(site: SiteDrift, *, with_now: bool) -> Drawing:
    assert site.values is not None
    title = f"{site.name} ({site.tensor}), {site.clipped:.2%} clipped"
    stored = site.stored.low, site.stored.high
    now = (site.now.low, site.now.high) if with_now and site.now is not None else None
    drawing = charts.spread(title, site.values, stored, now)
    return Drawing(drawing, f"histogram of {title}, with its quantization range")


def _site_names(origin: Provenance) -> list[str]:
    return [site.name for site in stored_plan(origin)]


def page_about(
    kind: Kind,
    what: str,
    conclusion: str,
    sections: Sequence[Section],
    origin: Provenance,
    about: About,
    of: str | None = None,
) -> Page:
    """The sections, the plan as a graph, what the model was made by, and how to read it all."""
    versions = origin.versions
    made_by = f"qrecipe {versions.get('qrecipe', '?')}, torch {versions.get('torch', '?')}"
    made = {"made by": made_by, "fingerprint": f"recipe {origin.fingerprint[:12]}"}
    plan = stored_plan(origin)
    end = [PlanGraph(plan), *origin_sections(origin), Reading(kind)]
    title = f"{what}: {plan.recipe if of is None else of}"
    return Page(title, conclusion, {**about, **made}, [*sections, *end])
