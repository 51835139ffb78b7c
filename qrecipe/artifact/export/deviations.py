"""Results of a compiled site that differ from those of the program in the last place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qrecipe.audit.sample import RIGHT_DB
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.short import ShortRepr
from qrecipe.errors.text import counted
from qrecipe.planning.plan import Site

_ONE_STEP = 1.01  # scaled by a float
_TIE = 0.01
"""What is no more steps from the middle of two may be rounded up or down: float32 is not exact.

The layers of resnet18 were up to 5e-5 steps away from it.
"""
_SHOWN = 3


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """What a site gives in a program, and what a compiled one gives for the same.

    ``unrounded`` is what the program rounds there, None if integers are added and the result is
    known exactly. ``step`` is the distance between two values that the result can take, None if it
    is float.
    """

    site: Site
    expected: Tensor
    found: Tensor
    unrounded: Tensor | None
    step: float | None

    @property
    def differs(self) -> bool:
        return not torch.equal(self.expected, self.found)


@dataclass(frozen=True, slots=True, repr=False)
class Deviation(ShortRepr):
    """How many results of a site differ, run alone: integers by one, where they lie between two.

    ``sqnr_db`` is that of a site with float results, which sums in another order; else None.
    """

    site: str
    op: str
    different: int
    results: int
    sqnr_db: float | None

    @staticmethod
    def of(result: Result) -> Deviation:
        return Deviation(
            result.site.name,
            result.site.op,
            int((result.expected != result.found).sum()),
            result.expected.numel(),
            sqnr_db(result.expected, result.found) if result.step is None else None,
        )

    def __str__(self) -> str:
        how = "by one step" if self.sqnr_db is None else f"{self.sqnr_db:.0f} dB apart"
        return f"{self.site} ({self.op}) in {self.different:,} of {self.results:,} results, {how}"


def differing(results: Iterable[Result]) -> tuple[Deviation, ...]:
    return tuple(Deviation.of(each) for each in results if each.differs)


def agreement(deviations: Sequence[Deviation], *, exact: bool) -> str:
    """What of a file is the same as in its model, in a sentence; see `lowering.Lowering`."""
    same = "the file gives the same bits as the model"
    if exact:
        return f"{same} computed in integers; {_most(deviations)}" if deviations else same
    if not deviations:
        return "run alone, each site of the file gives the same bits as the model"
    return _most(deviations)


def _most(deviations: Sequence[Deviation]) -> str:
    most = sorted(deviations, key=lambda each: -each.different / each.results)[:_SHOWN]
    one = len(deviations) == 1
    what = f"{counted(len(deviations), 'site')} of it {'differs' if one else 'differ'}"
    others = ", most" if len(deviations) > _SHOWN else ""
    shown = "; ".join(map(str, most))
    return f"run alone, {what} in the last place from the model{others}: {shown}"


Judge = Callable[[Result], str | None]
"""How far a result is from what a program has there, if that is too far."""


def in_db(result: Result) -> str | None:
    """A `Judge` that leaves room for roundings that fall the other way."""
    reached = sqnr_db(result.expected, result.found)
    return None if reached >= RIGHT_DB else f"{reached:.1f} dB"


def at_ties(result: Result) -> str | None:
    """A `Judge` of what is rounded: only what was float before may be rounded the other way.

    That is so where it lies between two steps.
    """
    if result.step is None or not result.differs:
        return in_db(result)
    steps = (result.found - result.expected).abs() / result.step
    if not float(steps.max()) < _ONE_STEP:
        return f"{float(steps.max()):.0f} quantization steps"
    if result.unrounded is None:
        return "one quantization step"
    to_tie = ((result.unrounded.double() / result.step).remainder(1) - 0.5).abs()
    farthest = float((to_tie * (steps > 0.5)).max())
    return None if farthest <= _TIE else f"one quantization step ({farthest:.2f} from a tie)"
