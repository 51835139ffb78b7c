"""``qrecipe suggest`` and ``qrecipe tune``: write recipes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qrecipe.authoring.suggest.suggest import suggestion
from qrecipe.authoring.tune.result import TuningResult, tuning_json
from qrecipe.authoring.tune.search import Trial
from qrecipe.authoring.tune.trials import Stop
from qrecipe.authoring.tune.tune import tune
from qrecipe.cli import output
from qrecipe.cli.html_pages import ForPage, planned_for_page, quantized_for_page, ranked_for_page
from qrecipe.cli.model_argument import load_subject, required_inputs
from qrecipe.cli.progress import bar
from qrecipe.cli.quantize import hints_for_command_line
from qrecipe.cli.user_code import UserCode, UserFunction, user_output
from qrecipe.errors.findings import QRecipeError
from qrecipe.files import write_atomically
from qrecipe.measure.pages.page import Page, check_writable, save_page
from qrecipe.measure.pages.plots import check_available
from qrecipe.measure.pages.reports import Ranked, tune_page
from qrecipe.planning.target_cpu import TargetCpu
from qrecipe.recipe.overlay import check_replaceable
from qrecipe.recipe.recipe import Recipe, load_recipe, parse_recipe


@dataclass(frozen=True, slots=True)
class Request:
    """The command line; ``log``, ``out`` and ``html`` are files."""

    recipe: str
    model: str
    data: str
    evaluate: str
    plugins: Sequence[str]
    threads: int | None
    log: str | None
    out: str | None
    html: str | None
    target_cpu: TargetCpu


@dataclass(frozen=True, slots=True)
class Limits:
    """How much accuracy may be lost, and how long to search."""

    max_drop: float
    max_trials: int | None
    max_seconds: float | None


def suggest(
    model: str,
    shapes: Sequence[str],
    num_batches: int | None,
    plugins: Sequence[str],
    out: str | None,
    *,
    as_json: bool,
) -> None:
    """Print or write a recipe for the model of a factory, named as on the command line."""
    with UserCode() as code, user_output():
        code.import_plugins(plugins)
        if out is not None:
            check_replaceable(Path(out))
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


def tune_recipe(request: Request, limits: Limits, *, as_json: bool) -> TuningResult:
    """Search, show the trials and the result, and write the requested files."""
    _check_outputs(request)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    with UserCode() as code:
        with user_output(), hints_for_command_line():
            job = _job(code, request)
            with bar("tuning") as show:
                result = tune(
                    job.model,
                    job.recipe,
                    job.data(),
                    job.evaluate,
                    max_drop=limits.max_drop,
                    max_trials=limits.max_trials,
                    max_seconds=limits.max_seconds,
                    resume=request.log,
                    progress=show,
                    target_cpu=request.target_cpu,
                )
        # a search takes long: show its result before anything that could fail or be interrupted
        _give(result, request.out, as_json=as_json)
        if request.html is not None:
            with user_output(), hints_for_command_line():
                page = _page(job, result, request.recipe)
            save_page(page, request.html)
    return result


def _check_outputs(request: Request) -> None:
    """Check before the search, which takes long, that the files can be written."""
    if request.html is not None:
        check_available()
        check_writable(request.html)
    if request.out is not None:
        check_replaceable(Path(request.out))


@dataclass(frozen=True, slots=True)
class _Job:
    recipe: Recipe
    model: nn.Module
    data: UserFunction
    evaluate: UserFunction
    target_cpu: TargetCpu


def _job(code: UserCode, request: Request) -> _Job:
    code.import_plugins(request.plugins)
    recipe = load_recipe(request.recipe)
    data = code.function(request.data, "--data")
    evaluate = code.function(request.evaluate, "--evaluate")
    model = load_subject(code, request.model, ()).model
    return _Job(recipe, model, data, evaluate, request.target_cpu)


def _give(result: TuningResult, out: str | None, *, as_json: bool) -> None:
    if as_json:
        output.out_json({**tuning_json(result), "out": out})
    else:
        output.out(str(result))
    if out is not None:
        result.save(out)
        if not as_json:
            output.out(f"\nwritten to {out}")


def _page(job: _Job, result: TuningResult, title: str) -> Page:
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
        metric=job.evaluate.name,
    )


def _quantized(job: _Job, result: TuningResult) -> ForPage | QRecipeError:
    if result.stopped == "interrupt":  # don't keep the user waiting
        return planned_for_page(job.model, result.recipe, job.data, _UNRANKED["interrupt"])
    return quantized_for_page(job.model, result.recipe, job.data, job.target_cpu)


def _ranking(job: _Job, result: TuningResult) -> Sequence[Ranked] | str:
    """The ranking of the search; if it needed none, a ranking of the recipe that it found."""
    if result.ranking:
        return [
            (cost.name, math.nan if cost.sqnr_db is None else cost.sqnr_db, cost.reason)
            for cost in result.ranking
        ]
    if result.stopped is not None and result.stopped in _UNRANKED:
        return _UNRANKED[result.stopped]
    return ranked_for_page(job.model, result.recipe, job.data, job.target_cpu)


_UNRANKED: Mapping[Stop, str] = {
    "interrupt": "the search was interrupted",
    "seconds": "time ran out before the sites were ranked",
}


def _shown(trial: Trial) -> tuple[str, float, bool]:
    if trial.metric is None:
        return f"{trial.what}: {trial.error}", math.nan, trial.kept
    return trial.what, trial.metric, trial.kept
