"""``qrecipe suggest`` and ``qrecipe tune``: write recipes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qrecipe.authoring.suggest.suggest import suggestion
from qrecipe.authoring.tune.result import TuningResult, tuning_json
from qrecipe.authoring.tune.search import Trial
from qrecipe.authoring.tune.trials import Stop
from qrecipe.authoring.tune.tune import tune
from qrecipe.cli import output
from qrecipe.cli.html_pages import ForPage, planned_for_page, quantized_for_page, ranked_for_page
from qrecipe.cli.model_argument import Job, get_ready, load_job, load_subject, required_inputs
from qrecipe.cli.user_code import user_code, user_output
from qrecipe.errors.findings import QRecipeError
from qrecipe.files import write_atomically
from qrecipe.measure.pages.page import Page, save_page
from qrecipe.measure.pages.reports import Ranked, tune_page
from qrecipe.planning.target_cpu import TargetCpu
from qrecipe.recipe.recipe import parse_recipe


def suggest(
    model: str,
    *,
    shapes: Sequence[str] | None,
    num_batches: int | None,
    out: str | None,
    plugins: Sequence[str] | None,
    as_json: bool,
) -> None:
    """Print or write a recipe for the model of a factory, named as on the command line."""
    get_ready(None, out=out)
    with user_code(plugins) as code, user_output():
        subject = load_subject(code, model, shapes)
        text = suggestion(subject.model, required_inputs(subject, model), num_batches)
    if out is not None:
        write_atomically(Path(out), text)
    if as_json:
        recipe = parse_recipe(text)
        output.out_json({"recipe": text, "fingerprint": recipe.fingerprint, "out": out})
    elif out is None:
        output.out(text.rstrip("\n"))
    else:
        output.out(f"written to {out}")


def tune_recipe(
    recipe: str,
    model: str,
    data: str,
    evaluate: str,
    *,
    max_drop: float,
    max_trials: int | None,
    max_seconds: float | None,
    log: str | None,
    out: str | None,
    html: str | None,
    target_cpu: TargetCpu,
    threads: int | None,
    plugins: Sequence[str] | None,
    as_json: bool,
) -> TuningResult:
    """Search, show the trials and the result, and write the requested files."""
    get_ready(threads, html=html, out=out)
    with user_code(plugins) as code:
        with user_output():
            measure = code.function(evaluate, "--evaluate")
            job = load_job(code, recipe, model, data, target_cpu)
            result = tune(
                job.model,
                job.recipe,
                job.data(),
                measure,
                max_drop=max_drop,
                max_trials=max_trials,
                max_seconds=max_seconds,
                resume=log,
                target_cpu=target_cpu,
            )
        # a search takes long: show its result before anything that could fail or be interrupted
        _give(result, out, as_json=as_json)
        if html is not None:
            with user_output():
                page = _page(replace(job, recipe=result.recipe), result, recipe, measure.name)
            save_page(page, html)
    return result


def _give(result: TuningResult, out: str | None, *, as_json: bool) -> None:
    if as_json:
        output.out_json({**tuning_json(result), "out": out})
    else:
        output.out(str(result))
    if out is not None:
        result.save(out)
        if not as_json:
            output.out(f"\nwritten to {out}")


def _page(job: Job, result: TuningResult, title: str, metric: str) -> Page:
    """The report of a search. Raises ``QRecipeError`` if its recipe can no longer be planned."""
    quantized = _quantized(job, result)
    if isinstance(quantized, QRecipeError):
        raise quantized
    return tune_page(
        title,
        [_shown(trial) for trial in result.trials],
        notes=result.notes,
        wanted=result.float_metric - result.max_drop,
        ranking=_ranking(job, result),
        activations=quantized.activations,
        origin=quantized.origin,
        metric=metric,
    )


def _quantized(job: Job, result: TuningResult) -> ForPage | QRecipeError:
    if result.stopped == "interrupt":  # don't keep the user waiting
        return planned_for_page(job, _UNRANKED["interrupt"])
    return quantized_for_page(job)


def _ranking(job: Job, result: TuningResult) -> Sequence[Ranked] | str:
    """The ranking of the search; if it needed none, a ranking of the recipe that it found."""
    if result.ranking:
        return [
            (cost.name, math.nan if cost.sqnr_db is None else cost.sqnr_db, cost.reason)
            for cost in result.ranking
        ]
    if result.stopped is not None and result.stopped in _UNRANKED:
        return _UNRANKED[result.stopped]
    return ranked_for_page(job)


_UNRANKED: Mapping[Stop, str] = {
    "interrupt": "the search was interrupted",
    "seconds": "time ran out before the sites were ranked",
}


def _shown(trial: Trial) -> tuple[str, float, bool]:
    if trial.metric is None:
        return f"{trial.what}: {trial.error}", math.nan, trial.kept
    return trial.what, trial.metric, trial.kept
