"""The ranking of sites by their effect on the output when quantized alone."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from qrecipe.errors.findings import ExecutionError
from qrecipe.errors.short import ShortRepr
from qrecipe.errors.text import counted, shown
from qrecipe.files import path_text
from qrecipe.measure.pages.sections import Bar, Bars, relative_error
from qrecipe.measure.result import SiteResult
from qrecipe.recipe import overlay
from qrecipe.recipe.recipe import Ingredient, Recipe, published
from qrecipe.terminal.report import Section, Table, Text, plain, values_of
from qrecipe.terminal.tables import bar, room_beside

Method = Literal["exact", "estimate"]

EFFECT = "SQNR of the output with this site alone quantized (dB)"

_BAR = 30


@dataclass(frozen=True, slots=True, repr=False)
class RankedSite(ShortRepr):
    """One site and its effect on the output, all other sites being float.

    ``sqnr_db`` is that of the model's output, None if the caller's measure ranks; ``value`` is the
    result of that measure. ``batches`` is the number of batches measured.
    """

    name: str
    op: str
    sqnr_db: float | None
    value: float | None
    batches: int


@dataclass(frozen=True, slots=True, repr=False)
class Ranking(SiteResult):
    """Sites, the worst first, and why others are not ranked.

    ``is_estimate``: the dB are estimates; ``partial``: an interrupt ended the measurement early;
    ``float_value``: the result of the caller's measure for the float model; ``by_evaluation``: it
    is a function of a model, which has its own data.
    """

    sites: tuple[RankedSite, ...]
    unranked: Mapping[str, str]
    method: Method
    batches: int
    partial: bool
    float_value: float | None
    recipe: Recipe = field(repr=False)
    members: frozenset[str] = field(repr=False)
    by_evaluation: bool = False

    @property
    def is_estimate(self) -> bool:
        return self.method == "estimate"

    @property
    def ingredients(self) -> tuple[Ingredient, ...]:
        """The files of the ranked recipe."""
        return self.recipe.ingredients

    def _sections(self) -> Iterator[Section]:
        longest = max((error for site in self.sites if (error := self.error(site)) > 0), default=0)
        columns = [(site.name, site.op, self.shown(site)) for site in self.sites]
        header = ("site", "operation", self._label)
        room = room_beside((header, *columns), _BAR)
        rows = [
            (*cells, bar(self.error(site), longest, room))
            for cells, site in zip(columns, self.sites, strict=True)
        ]
        yield Table("Ranking", (*header, self.bar_label), rows, numeric=frozenset({2}))
        yield Text("Result", self._notes())

    @property
    def _label(self) -> str:
        if self.float_value is not None:
            return "measure alone"
        return "dB alone (estimate)" if self.is_estimate else "dB alone"

    @property
    def bar_label(self) -> str:
        """What the length of a bar is, in words."""
        if self.float_value is not None:
            return f"below {self.float_value:.6g} of the float model"
        return "error of the output" + (", estimated" if self.is_estimate else "")

    def shown(self, site: RankedSite) -> str:
        """The dB or the result of the caller's measure, in words."""
        if site.sqnr_db is None:
            return f"{site.value:.6g}"
        if site.sqnr_db == math.inf:
            return "exact"
        return f"{'~' if self.is_estimate else ''}{site.sqnr_db:.1f}"

    def error(self, site: RankedSite) -> float:
        """The length of the bar: the relative error of the output, or the loss in the measure."""
        if site.sqnr_db is not None:
            return relative_error(site.sqnr_db)
        assert site.value is not None
        assert self.float_value is not None
        loss = self.float_value - site.value
        return loss if math.isfinite(loss) else 0.0

    def _notes(self) -> list[str]:
        batches = counted(self.batches, "batch")
        by = "measured by evaluate" if self.by_evaluation else f"over {batches}"
        notes = [f"{counted(len(self.sites), 'site')}, each quantized alone, {by}"]
        if self.is_estimate:
            notes.append("The dB are estimates from random projections: use them for the order.")
        if self.partial:
            notes.append("Interrupted: the ranking covers what was measured so far.")
        if self.unranked:
            lack = "has no error of its" if len(self.unranked) == 1 else "have no error of their"
            notes.append(f"{counted(len(self.unranked), 'site')} {lack} own.")
        return [*notes, *published(self.ingredients)]

    def _document(self) -> dict[str, Any]:
        names = ("ingredients", "method", "is_estimate", "partial", "batches", "float_value")
        sites = [
            {
                **plain(site),
                "exact": site.sqnr_db == math.inf,
                "is_estimate": self.is_estimate,
            }
            for site in self.sites
        ]
        return {**values_of(self, *names), "sites": sites, "unranked": self.unranked}

    def _bars(self) -> Sequence[Bars]:
        bars = [Bar(site.name, self.shown(site), (self.error(site),)) for site in self.sites]
        return [Bars("Ranking, worst first", bars, self.bar_label, self.label)]

    @property
    def values(self) -> dict[str, float]:
        """By site, the dB or the result of the caller's measure; NaN for none."""
        by_db = self.float_value is None
        found = {site.name: site.sqnr_db if by_db else site.value for site in self.sites}
        return {name: math.nan if value is None else value for name, value in found.items()}

    @property
    def label(self) -> str:
        """What `values` are, in words."""
        if self.float_value is not None:
            return "measure with this site alone quantized"
        return f"{EFFECT}{', estimate' if self.is_estimate else ''}"

    def to_recipe(
        self, keep_float: int | None = None, *, min_sqnr_db: float | None = None
    ) -> Recipe:
        """The recipe with some sites left float: an overlay that extends it.

        ``keep_float`` is the number of worst sites, ``min_sqnr_db`` takes all sites below it. A
        recipe without a path or reference is inlined.

        Raises ``ExecutionError`` (QR425) unless exactly one of the two is given and valid.
        """
        return overlay.overlay_recipe(self.recipe, self._rules(keep_float, min_sqnr_db))

    def save_overlay(
        self,
        path: str | os.PathLike[str],
        keep_float: int | None = None,
        *,
        min_sqnr_db: float | None = None,
    ) -> None:
        """Write the recipe of `to_recipe` as a file that extends the ranked one.

        Raises as `to_recipe`, and ``RecipeReferenceError`` (QR001) if it cannot be written or would
        overwrite a file that is not a recipe.
        """
        file = Path(path_text(path, "save_overlay takes a path"))
        overlay.save_overlay(self.recipe, self._rules(keep_float, min_sqnr_db), file)

    def _rules(self, keep_float: int | None, min_sqnr_db: float | None) -> dict[str, Any]:
        """What leaves the chosen sites float, with the reason of each."""
        worst = self._worst(keep_float, min_sqnr_db)
        return overlay.overlay_values({s.name: self.reason(s) for s in worst}, self.members)

    def _worst(self, keep_float: int | None, min_sqnr_db: float | None) -> Sequence[RankedSite]:
        if (keep_float is None) == (min_sqnr_db is None):
            raise contradiction("pass either keep_float or min_sqnr_db")
        if keep_float is not None:
            if not isinstance(keep_float, Integral) or keep_float < 0:
                raise contradiction(f"keep_float is {shown(keep_float)}, not a number of sites")
            return self.sites[:keep_float]
        if not isinstance(min_sqnr_db, Real) or math.isnan(min_sqnr_db):
            raise contradiction(f"min_sqnr_db is {shown(min_sqnr_db)}, not a number of dB")
        if self.float_value is not None:
            raise contradiction(
                "min_sqnr_db needs a ranking by SQNR, but this one is by your own measure"
            )
        # not "less than": NaN is bad enough too
        return [s for s in self.sites if s.sqnr_db is None or not s.sqnr_db >= min_sqnr_db]

    def reason(self, site: RankedSite) -> str:
        """What quantizing it alone costs, in a few words."""
        if site.sqnr_db is None:
            return f"{site.value:.6g} instead of {self.float_value:.6g} when quantized alone"
        if site.sqnr_db == math.inf:
            return "no effect on the output when quantized alone"
        about = "about " if self.is_estimate else ""
        note = " (estimate)" if self.is_estimate else ""
        return f"{about}{site.sqnr_db:.1f} dB when quantized alone{note}"


def worst_first(site: RankedSite) -> float:
    """The sort key of sites: NaN first, then the smallest SQNR or value."""
    value = site.value if site.sqnr_db is None else site.sqnr_db
    assert value is not None
    return -math.inf if math.isnan(value) else value


def contradiction(message: str) -> ExecutionError:
    """The error for arguments that are invalid or contradict each other (QR425)."""
    return ExecutionError.of("QR425", message)
