"""What was measured decides: a choice by prediction has to be faster than what it replaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Literal

Winner = Literal["recipe", "mixture", "float"]
"""The recipe as it was given, with more sites left float, or with all of them float."""

Seconds = Sequence[float]
"""Of one model, round by round; the models took turns in each round."""

_NOISE = 0.03


def is_faster(one: Seconds, other: Seconds) -> bool:
    """Whether one model is faster beyond noise: by more than 3 % in three quarters of the rounds.

    Each round is compared with itself, since other load on the machine affects both alike.
    """
    ratios = [mine / others for mine, others in zip(one, other, strict=True)]
    *_, upper = quantiles(ratios, n=4, method="inclusive")
    return upper < 1 - _NOISE


@dataclass(frozen=True, slots=True)
class Race:
    """The times of the float model, of the recipe as it is, and of a mixture if there is one."""

    in_float: Seconds
    recipe: Seconds
    mixture: Seconds | None = None

    @property
    def winner(self) -> Winner:
        """What to recommend: something else than the recipe only if that is faster.

        A mixture that is not faster than float by the middle of the rounds is float's win.
        """
        if is_faster(self.in_float, self._best):
            return "float"
        if self._best is self.recipe:
            return "recipe"
        return "float" if median(self.in_float) < median(self._best) else "mixture"

    @property
    def is_won_by_int8(self) -> bool:
        """Whether the recipe, or the mixture, is faster than the float model."""
        return is_faster(self._best, self.in_float)

    @property
    def _best(self) -> Seconds:
        """The mixture if it is faster than the recipe."""
        if self.mixture is not None and is_faster(self.mixture, self.recipe):
            return self.mixture
        return self.recipe
