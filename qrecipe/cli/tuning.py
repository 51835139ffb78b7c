"""``qrecipe suggest`` and ``qrecipe tune``: recipes that the tool writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qrecipe.authoring.suggest import suggestion
from qrecipe.authoring.tune import tune
from qrecipe.authoring.tune_result import TuningResult, tuning_json
from qrecipe.cli import output
from qrecipe.cli.progress import bar
from qrecipe.cli.quantizing import hints_for_command_line
from qrecipe.cli.subjects import load_subject, required_inputs
from qrecipe.cli.usercode import UserCode, user_output
from qrecipe.measure.overlay import check_replaceable
from qrecipe.recipe import load_recipe, parse_recipe
from qrecipe.writing import write_atomically


@dataclass(frozen=True, slots=True)
class Request:
    """What to tune, as on the command line; ``log`` and ``out`` are files."""

    recipe: str
    model: str
    data: str
    evaluate: str
    plugins: Sequence[str]
    threads: int | None
    log: str | None
    out: str | None


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be lost, and how long to search."""

    max_drop: float
    max_trials: int | None
    max_seconds: float | None


def suggest(
    model: str, shapes: Sequence[str], plugins: Sequence[str], out: str | None, *, as_json: bool
) -> None:
    """Print or write a recipe for the model of a factory, named as on the command line."""
    with UserCode() as code, user_output():
        code.import_plugins(plugins)
        if out is not None:
            check_replaceable(Path(out))
        subject = load_subject(code, model, shapes)
        text = suggestion(subject.model, required_inputs(subject, model))
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
    """Search, show the trials and what was found, and write the recipe where that is wished for."""
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    with UserCode() as code, user_output(), hints_for_command_line():
        code.import_plugins(request.plugins)
        recipe = load_recipe(request.recipe)
        if request.out is not None:
            check_replaceable(Path(request.out))
        data = code.function(request.data, "--data")
        evaluate = code.function(request.evaluate, "--evaluate")
        subject = load_subject(code, request.model, ())
        with bar("tuning") as show:
            result = tune(
                subject.model,
                recipe,
                data(),
                evaluate,
                max_drop=limits.max_drop,
                max_trials=limits.max_trials,
                max_seconds=limits.max_seconds,
                resume=request.log,
                progress=show,
            )
    if request.out is not None:
        result.save(request.out)
    if as_json:
        output.out_json({**tuning_json(result), "out": request.out})
    else:
        output.out(str(result))
        if request.out is not None:
            output.out(f"\nwritten to {request.out}")
    return result
