"""What was measured decides: a choice by prediction has to be faster than what it replaces."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Literal

from qrecipe.measure.turns import Seconds, Speed

Winner = Literal["recipe", "mixture", "float"]
"""The recipe as it was given, with more sites left float, or with all of them float."""


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
        if Speed.of(self.in_float, self._best).is_faster:
            return "float"
        if self._best is self.recipe:
            return "recipe"
        return "float" if median(self.in_float) < median(self._best) else "mixture"

    @property
    def speed(self) -> Speed:
        """How many times as fast as the float model the recipe is, or the mixture."""
        return Speed.of(self._best, self.in_float)

    @property
    def _best(self) -> Seconds:
        """The mixture if it is faster than the recipe."""
        if self.mixture is not None and Speed.of(self.mixture, self.recipe).is_faster:
            return self.mixture
        return self.recipe
