"""The log of a search: what has been measured, so that it can be resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qrecipe.authoring.tune.cheapest_sets import SiteCost
from qrecipe.authoring.tune.search import Measured, Trial
from qrecipe.errors.findings import ExecutionError, Finding
from qrecipe.errors.text import shown
from qrecipe.files import check_replaceable_file, replace_file, why_not

_FORMAT = 1


Entry = dict[str, Any]
"""A trial as `trial_json` returns it, with the fingerprint of its recipe under ``recipe``."""


@dataclass(slots=True)
class TrialLog:
    """What has been measured for a model and base recipe, written after each step.

    ``costs`` and ``entries`` are keyed by the recipe's fingerprint. Without a ``path`` nothing is
    written.
    """

    path: Path | None
    base: str
    model: str
    environment: str
    float_metric: float | None = None
    costs: dict[str, tuple[SiteCost, ...]] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)

    def measured(self, fingerprint: str) -> Measured | None:
        """What an earlier run measured for this recipe."""
        entry = self.entries.get(fingerprint)
        return (
            None if entry is None else Measured(entry["metric"], entry["seconds"], entry["error"])
        )

    def note_float(self, metric: float) -> None:
        self.float_metric = metric
        self._write()

    def note_costs(self, fingerprint: str, costs: Sequence[SiteCost]) -> None:
        self.costs[fingerprint] = tuple(costs)
        self._write()

    def note_trial(self, fingerprint: str, trial: Trial) -> None:
        self.entries[fingerprint] = {"recipe": fingerprint, **trial_json(trial)}
        self._write()

    def _write(self) -> None:
        """Raises ``ExecutionError`` (QR332) if that fails."""
        if self.path is None:
            return
        text = json.dumps(self._values(), indent=2, allow_nan=False)
        try:
            replace_file(self.path, [f"{text}\n".encode()])
        except (OSError, ValueError) as error:
            raise _unusable(self.path, "cannot be written", why_not(error)) from None

    def _values(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "base": self.base,
            "model": self.model,
            "environment": self.environment,
            "float_metric": self.float_metric,
            "sites": {
                fingerprint: [cost_json(cost) for cost in costs]
                for fingerprint, costs in self.costs.items()
            },
            "trials": list(self.entries.values()),
        }


def cost_json(cost: SiteCost) -> dict[str, Any]:
    """A ranked site as plain values, with stable keys."""
    return {
        "name": cost.name,
        "reason": cost.reason,
        "share": cost.share,
        "sqnr_db": cost.sqnr_db,
    }


def trial_json(trial: Trial) -> dict[str, Any]:
    """A trial as plain values, with stable keys."""
    return {
        "what": trial.what,
        "levers": [lever.what for lever in trial.candidate.levers],
        "float": sorted(trial.candidate.floats),
        "metric": trial.metric,
        "within": trial.within,
        "kept": trial.kept,
        "seconds": trial.seconds,
        "error": trial.error,
    }


def again(fingerprint: str) -> str:
    """The key of the second measurement of a recipe."""
    return f"{fingerprint} again"


def open_log(path: Path | None, base: str, model: str, environment: str) -> TrialLog:
    """The log at a path, or a new one.

    ``base`` is a fingerprint, ``model`` a digest of weights, ``environment`` what it ran on.
    Raises ``ExecutionError`` if it belongs to another recipe, model or environment (QR331), is not
    a log or cannot be written (QR332).
    """
    log = TrialLog(path, base, model, environment)
    if path is None:
        return log
    _check_writable(path)
    if not path.exists():
        return log
    values = _read(path)
    for key, own, what in (
        ("base", base, "a search for another recipe"),
        ("model", model, "a search for another model"),
        ("environment", environment, f"a search in another environment than {environment}"),
    ):
        if values.get(key) != own:
            raise ExecutionError(
                Finding(
                    "QR331",
                    f"{shown(str(path))} is the log of {what}",
                    hint="name another file, or delete this one to start over",
                )
            )
    try:
        log.float_metric = _finite_or_none(values["float_metric"])
        log.costs = {
            fingerprint: tuple(_cost(cost) for cost in costs)
            for fingerprint, costs in values["sites"].items()
        }
        log.entries = {entry["recipe"]: _entry(entry) for entry in values["trials"]}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unusable(path, "is not a trial log", f"{type(error).__name__}: {error}") from None
    return log


def _check_writable(path: Path) -> None:
    try:
        check_replaceable_file(path)
    except (OSError, ValueError) as error:
        raise _unusable(path, "cannot be written", why_not(error)) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unusable(path, "cannot be read", why_not(error)) from None
    except (ValueError, RecursionError):
        raise _unusable(path, "is not a trial log", "it is not JSON") from None
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise _unusable(path, "is not a trial log", "its format is unknown")
    if not {"base", "model"} <= values.keys():
        raise _unusable(path, "is not a trial log", "it has no recipe and model")
    return values


def _cost(values: Entry) -> SiteCost:
    return SiteCost(
        str(values["name"]),
        str(values["reason"]),
        _finite(values["share"]),
        _finite_or_none(values["sqnr_db"]),
    )


def _entry(values: Entry) -> Entry:
    """The entry, checked for what `TrialLog.measured` reads."""
    metric, error = values["metric"], values["error"]
    if (metric is None) == (error is None):
        raise ValueError("a trial needs a metric or an error")
    return {
        **values,
        "metric": _finite_or_none(metric),
        "seconds": _finite(values["seconds"]),
        "error": None if error is None else str(error),
    }


def _finite_or_none(value: Any) -> float | None:
    return None if value is None else _finite(value)


def _finite(value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def _unusable(path: Path, what: str, why: str) -> ExecutionError:
    finding = Finding(
        "QR332",
        f"{shown(str(path))} {what}: {why}",
        hint="name another file for the trial log, or delete this one to start over",
    )
    return ExecutionError(finding)
