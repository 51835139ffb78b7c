"""How far an output is from the float one, by SQNR or the caller's measure; and the log of it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from qrecipe.audit.sqnr import Totals
from qrecipe.errors.findings import ExecutionError, QRecipeError
from qrecipe.errors.text import first_line
from qrecipe.measure.owner import owner_of
from qrecipe.planning.plan import Plan
from qrecipe.planning.target_cpu import TargetCpu
from qrecipe.pool.log import PieceLog, open_pieces

Metric = Callable[[Any, Any], float]
"""``metric(outputs, reference)`` of one batch; higher is better."""


Effect = tuple[float | None, float | None, int]
"""The SQNR in dB or the value of the caller's measure, and the number of batches."""


Part = Totals | float
"""What one call of the model adds to the score of a site: sums, or the caller's metric."""


def part_of(metric: Metric | None, reference: Any, output: Any) -> Part:
    """By the caller's metric, or by SQNR."""
    if metric is not None:
        return number(lambda: metric(output, reference), "metric")
    totals = Totals()
    totals.add(reference, output)
    return totals


class Score:
    """What the parts of one site over the calls of all batches amount to.

    In the order of the calls, the effect is the same to the bit, whoever computed the parts.
    """

    def __init__(self) -> None:
        self._count = 0
        self._totals = Totals()
        self._sum: float | None = None

    def add(self, part: Part) -> None:
        self._count += 1
        if isinstance(part, Totals):
            self._totals.merge(part)
        else:
            self._sum = (self._sum or 0.0) + part

    def effect(self) -> Effect:
        """The SQNR in dB over all batches together, or the mean of the caller's measure."""
        if self._sum is not None:
            return None, self._sum / self._count, self._count
        fidelity = self._totals.fidelity()
        if fidelity is None:
            raise ExecutionError.of(
                "QR422",
                "the model's output has no floating tensor to rank by",
                hint="pass your own measure as metric= or evaluate=",
            )
        return fidelity.sqnr_db, None, self._count


def number(measure: Callable[[], Any], name: str) -> float:
    """The result of the caller's measure as a number. Raises ``ExecutionError`` (QR423)."""
    try:
        value = measure()
    except QRecipeError:
        raise
    except Exception as error:
        text = f"{name} failed: {type(error).__name__}: {first_line(error)}"
        raise ExecutionError.of("QR423", text) from error
    try:
        found = float(value)
    except (TypeError, ValueError, RuntimeError):
        text = f"{name} returns a {type(value).__name__}, not a number"
        hint = "return the quality of the outputs as a float; higher is better"
        raise ExecutionError.of("QR423", text, hint=hint) from None
    if math.isnan(found):
        raise ExecutionError.of("QR423", f"{name} returns NaN, which cannot be ranked")
    return found


@dataclass(frozen=True, slots=True)
class PartLog:
    """The parts of each site on each batch: those that are known, and those that are added."""

    pieces: PieceLog[Any] = field(default_factory=PieceLog)

    def parts(self, index: int, name: str) -> Sequence[Any]:
        """The parts of a site, call by call; empty if they are not known."""
        found: Sequence[Part] = self.pieces.kept.get(_key(index, name), ())
        return found

    def left(self, index: int, names: Iterable[str]) -> tuple[str, ...]:
        """The sites of which nothing is known on this batch."""
        return tuple(name for name in names if not self.parts(index, name))

    def value(self, name: str, compute: Callable[[], Part]) -> Any:
        """The only part of an evaluation, which is computed and added if it is not known."""
        return self.pieces.value(_key(0, name), lambda: [compute()])[0]

    def note(self, index: int, parts: Mapping[str, Sequence[Part]]) -> None:
        """Raises ``ExecutionError`` (QR332) if it cannot be written."""
        self.pieces.note({_key(index, name): found for name, found in parts.items()})


def _key(index: int, name: str) -> str:
    return f"{index} {name}"


def ranking_log(
    resume: str | os.PathLike[str] | None,
    plan: Plan,
    model: nn.Module,
    batches: Iterable[Any],
    functions: Mapping[str, Callable[..., Any] | None],
    target_cpu: TargetCpu,
) -> PartLog:
    """The log at a path, or a new one; an empty one without a path.

    ``functions`` are the caller's: ``evaluate``, ``metric`` and ``forward``. Raises as
    `open_pieces`, and ``ExecutionError`` (QR425) for batches that have no digest.
    """
    if resume is None:
        return PartLog()
    settings = {"target CPU": target_cpu}
    owner = owner_of("a ranking", plan, model, batches, functions=functions, settings=settings)
    by_sqnr = functions["evaluate"] is None and functions["metric"] is None
    kind: Any = Totals if by_sqnr else float
    return PartLog(open_pieces(resume, owner, Annotated[list[kind], Field(min_length=1)]))
