"""The log of a search: what has been measured, so that it can be resumed."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from qrecipe import _version
from qrecipe.authoring.tune.estimates import Estimates
from qrecipe.authoring.tune.levers import Candidate
from qrecipe.authoring.tune.search import Measured, Trial
from qrecipe.errors.text import first_problem
from qrecipe.files import check_replaceable_file, replace_file
from qrecipe.model.digest import model_digest
from qrecipe.planning.target_cpu import TargetCpu, target_has_vnni
from qrecipe.pool.log import Owner, log_path, no_log, usable
from qrecipe.recipe.recipe import Recipe
from qrecipe.terminal.report import values_of

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


class LoggedTrial(BaseModel):
    """A trial as `trial_json` returns it; ``recipe`` is the fingerprint of its recipe.

    ``ahead`` tells that a worker tried it before the search asked for it.
    """

    model_config = ConfigDict(**_STRICT, extra="allow")

    recipe: str
    metric: float | None
    seconds: float
    error: str | None
    latency: float | None
    is_slower: bool = False
    ahead: bool = False

    @model_validator(mode="after")
    def _has_a_result(self) -> LoggedTrial:
        if (self.metric is None) == (self.error is None):
            raise ValueError("a trial needs a metric or an error")
        return self


class TrialLog(BaseModel):
    """What has been measured for a model and base recipe, written after each step.

    ``estimates`` are those of a recipe by its fingerprint. ``ahead`` has what workers tried and no
    trial has needed. Without a ``path`` nothing is written.
    """

    model_config = _STRICT

    path: Path | None = Field(default=None, exclude=True)
    format: Literal[3]
    owner: Owner
    float_metric: float | None
    estimates: dict[str, Estimates]
    trials: list[LoggedTrial]
    ahead: list[LoggedTrial] = []

    def measured(self, fingerprint: str) -> Measured | None:
        """What an earlier run measured for this recipe."""
        for trial in (*self.trials, *self.ahead):
            if trial.recipe == fingerprint:
                return Measured(
                    trial.metric, trial.seconds, trial.error, trial.latency, trial.is_slower
                )
        return None

    def note_float(self, metric: float) -> None:
        self.float_metric = metric
        self._write()

    def note_estimates(self, fingerprint: str, estimates: Estimates) -> None:
        self.estimates[fingerprint] = estimates
        self._write()

    def note_trial(self, fingerprint: str, trial: Trial) -> None:
        entries = {each.recipe: each for each in self.trials}
        earlier = {**entries, **{each.recipe: each for each in self.ahead}}.get(fingerprint)
        ahead = earlier is not None and earlier.ahead
        entries[fingerprint] = LoggedTrial(recipe=fingerprint, ahead=ahead, **trial_json(trial))
        self.trials = list(entries.values())
        self.ahead = [each for each in self.ahead if each.recipe != fingerprint]
        self._write()

    def note_ahead(self, fingerprint: str, candidate: Candidate, measured: Measured) -> None:
        """Keep what a worker found that no trial has needed yet."""
        entry = {**_candidate_json(candidate), **asdict(measured)}
        self.ahead = [*self.ahead, LoggedTrial(recipe=fingerprint, ahead=True, **entry)]
        self._write()

    def _write(self) -> None:
        """Raises ``ExecutionError`` (QR332) if that fails."""
        if self.path is None:
            return
        text = f"{self.model_dump_json(indent=2)}\n"
        with usable(self.path, "written"):
            replace_file(self.path, lambda stream: stream.write(text.encode()))


def trial_json(trial: Trial) -> dict[str, Any]:
    """A trial as plain values, with stable keys."""
    measured = ("metric", "within", "kept", "seconds", "error", "latency", "is_slower")
    return {
        "what": trial.what,
        **_candidate_json(trial.candidate),
        **values_of(trial, *measured),
    }


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    levers = [lever.what for lever in candidate.levers]
    return {"levers": levers, "float": sorted(candidate.floats)}


def again(fingerprint: str) -> str:
    """The key of the second measurement of a recipe."""
    return f"{fingerprint} again"


def search_owner(recipe: Recipe, model: nn.Module, target_cpu: TargetCpu, batches: str) -> Owner:
    """What the accuracy of trials depends on, apart from evaluation; batches by their digest."""
    vnni = "with VNNI" if target_has_vnni(target_cpu) else "without VNNI"
    return Owner(
        "a search",
        {
            "another recipe": recipe.fingerprint,
            "another model": model_digest(model),
            "other batches": batches,
        },
        {"torch": torch.__version__, "qrecipe": _version.__version__, "a CPU": vnni},
    )


def open_log(resume: str | os.PathLike[str] | None, owner: Owner) -> TrialLog:
    """The log at a path, or a new one.

    Raises ``ExecutionError`` if it belongs to another recipe, model, environment or other batches
    (QR331), is not a log or cannot be written (QR332).
    """
    path = None if resume is None else log_path(resume)
    new = TrialLog(path=path, format=3, owner=owner, float_metric=None, estimates={}, trials=[])
    if path is None:
        return new
    with usable(path):
        check_replaceable_file(path)
        content = path.read_bytes() if path.exists() else b""
    if not content:
        return new
    try:
        log = TrialLog.model_validate_json(content)
    except ValidationError as error:
        raise no_log(path, "a trial log", first_problem(error)) from None
    owner.check(path, log.owner)
    log.path = path
    return log
