"""The log of a ranking: what each site has given on each batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from qrecipe.audit.sqnr import Totals
from qrecipe.measure.owner import owner_of
from qrecipe.measure.sensitivity.scores import Part
from qrecipe.planning.plan import Plan
from qrecipe.planning.target_cpu import TargetCpu
from qrecipe.pool.log import PieceLog, open_pieces


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
