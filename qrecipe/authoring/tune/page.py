"""The page about a search."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qrecipe.authoring.tune.result import TuningResult
from qrecipe.authoring.tune.search import Trial
from qrecipe.execution.provenance import Provenance
from qrecipe.measure.pages import charts
from qrecipe.measure.pages.page import Page
from qrecipe.measure.pages.reports import About, Activations, Ranked, page_about, ranked_sections
from qrecipe.measure.pages.sections import Drawing, Figure
from qrecipe.terminal.report import Section, Table, Text


def tune_page(
    result: TuningResult,
    ranking: Sequence[Ranked] | str,
    activations: Activations,
    origin: Provenance,
    about: About,
    metric: str,
) -> Page:
    """How a recipe was tuned, and what came of it.

    ``ranking`` has the sites, worst first, or says why there is none. ``origin`` is of the model
    that the tuned recipe gives; ``metric`` names what was evaluated.
    """
    trials, wanted = result.trials, result.float_metric - result.max_drop
    kept = f"Trials: {len(trials)}, of which the search kept {sum(t.kept for t in trials)}."
    sections: list[Section] = [Text("Result", [*result.notes, kept])]
    points = [(math.nan if t.metric is None else t.metric, t.kept) for t in trials]
    if any(math.isfinite(value) for value, _ in points):
        drawing = charts.trials(points, wanted, metric)
        alt = f"{metric} of each of {len(points)} trials"
        sections.append(Figure("Trials", [Drawing(drawing, alt)]))
    weighed = [
        (trial.latency, trial.metric, trial in result.front)
        for trial in trials
        if trial.latency is not None and trial.metric is not None and not trial.is_repeated
    ]
    if weighed:
        drawing = charts.front(weighed, wanted, metric)
        alt = f"{metric} of {len(weighed)} trials over their latency"
        caption = "Each latency was measured in turns with the float model's."
        sections.append(Figure("Accuracy against latency", [Drawing(drawing, alt)], caption))
    rows = [(str(place), *_cells(trial)) for place, trial in enumerate(trials, 1)]
    sections += [
        *ranked_sections(ranking, activations, origin),
        Table("Trials in order", ("trial", "change", metric, ""), rows, numeric=frozenset({0, 2})),
    ]
    tuned = about["recipe"]
    return page_about("tune", "Tuning", result.outcome, sections, origin, about, of=tuned)


def _cells(trial: Trial) -> tuple[str, str, str]:
    if trial.metric is None:
        return f"{trial.what}: {trial.error}", "none", "failed"
    return trial.what, f"{trial.metric:.6g}", "kept" if trial.kept else "not kept"
