"""What a profile says: times of sites and boundaries, and of the whole they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qrecipe.errors.short import ShortRepr
from qrecipe.errors.text import counted
from qrecipe.measure.pages.sections import Bar, Bars
from qrecipe.measure.profile.passes import Direction
from qrecipe.measure.result import SiteResult
from qrecipe.measure.turns import Timing, total
from qrecipe.planning.plan import Verdict
from qrecipe.recipe.recipe import Ingredient, published
from qrecipe.terminal.report import Section, Table, Text, plain, values_of
from qrecipe.terminal.tables import bar, room_beside

_BAR = 24
_SPARE = (1, 2, 7, 9, 6, 4, 8)
"""Columns by how little they are missed: first the operation, last float/int8."""

_FAR = 0.1
"""How far the sum of the parts may be from the whole, as a share of it, before a report says so."""


@dataclass(frozen=True, slots=True, repr=False)
class ProfiledSite(ShortRepr):
    """One site: the time of its float form, and of what it is in the converted model.

    ``channels_last_time`` is that of its float form on images in channels_last, as it gets them
    from a quantized convolution. ``quantize_time`` and ``dequantize_time`` are what it takes to
    convert its result; zero if the converted model has it in float.
    """

    name: str
    op: str
    verdict: Verdict
    float_time: Timing
    channels_last_time: Timing
    int8_time: Timing
    quantize_time: Timing
    dequantize_time: Timing

    @property
    def loss(self) -> float:
        """Seconds that the converted model needs more for it than the float model."""
        return self.int8_time.seconds - self.float_time.seconds


@dataclass(frozen=True, slots=True, repr=False)
class ProfiledBoundary(ShortRepr):
    """One tensor that the converted model quantizes or dequantizes."""

    tensor: str
    direction: Direction
    time: Timing


@dataclass(frozen=True, slots=True, repr=False)
class Conditions(ShortRepr):
    """What the times depend on, besides the model."""

    cpu: str
    threads: int
    batch: str
    torch: str
    rounds: int

    @property
    def text(self) -> str:
        threads = counted(self.threads, "thread")
        return f"{self.cpu}, {threads}, torch {self.torch}, batch {self.batch}"


@dataclass(frozen=True, slots=True, repr=False)
class Profile(SiteResult):
    """The time of each site and boundary, the worst loss first.

    ``eager`` is the caller's model, ``fused`` the float model with its operations fused as in the
    plan, which is what a site's float time is a part of, and ``int8`` the converted model: each
    measured whole. ``float_rest`` and ``int8_rest`` are spent outside sites.
    """

    sites: tuple[ProfiledSite, ...]
    boundaries: tuple[ProfiledBoundary, ...]
    eager: Timing
    fused: Timing
    int8: Timing
    float_rest: Timing
    int8_rest: Timing
    conditions: Conditions
    ingredients: tuple[Ingredient, ...] = ()

    @property
    def float_sum(self) -> float:
        """Seconds of all sites in float, and of what is outside of them."""
        return total(site.float_time for site in self.sites) + self.float_rest.seconds

    @property
    def int8_sum(self) -> float:
        """Seconds of all sites and boundaries of the converted model, and of the rest."""
        return (
            total(site.int8_time for site in self.sites)
            + total(boundary.time for boundary in self.boundaries)
            + self.int8_rest.seconds
        )

    def _sections(self) -> Iterator[Section]:
        yield self._site_table()
        if self.boundaries:
            yield self._boundary_table()
        yield Text("Result", self._notes())

    def _site_table(self) -> Table:
        columns = [
            (
                site.name,
                site.op,
                site.verdict,
                *_cells(site.float_time),
                *_cells(site.int8_time),
                _ms(site.channels_last_time.seconds),
                _ratio(site.float_time, site.int8_time),
            )
            for site in self.sites
        ]
        header = (
            *("site", "operation", "verdict"),
            *("float ms", "±", "int8 ms", "±", "channels_last ms", "float/int8"),
        )
        room = room_beside((header, *columns), _BAR)
        worst = max((abs(site.loss) for site in self.sites), default=0.0)
        rows = [
            (*cells, bar(site.loss, worst, room))
            for cells, site in zip(columns, self.sites, strict=True)
        ]
        numbers = frozenset(range(3, 9))
        return Table("Sites", (*header, "lost in int8"), rows, numeric=numbers, spare=_SPARE)

    def _boundary_table(self) -> Table:
        rows = [(each.direction, each.tensor, *_cells(each.time)) for each in self.boundaries]
        header = ("boundary", "tensor", "ms", "±")
        return Table("Boundaries", header, rows, numeric=frozenset({2, 3}))

    def _notes(self) -> list[str]:
        boundaries = total(each.time for each in self.boundaries)
        ratio = _ratio(self.eager, self.int8)
        whole = f"float/int8 = {ratio}" if ratio else "no difference beyond noise"
        notes = [
            f"whole model: float {_with_spread(self.eager)}, int8 {_with_spread(self.int8)}, "
            f"{whole}; boundaries {_ms(boundaries)} ms of it",
            f"Each time is the lower quartile of {self.conditions.rounds} rounds, ± the distance "
            "to the upper one. Where these are larger than the difference, no ratio is given. "
            f"{self.conditions.text}.",
        ]
        return [*notes, *self._doubts(), *published(self.ingredients)]

    def _doubts(self) -> Iterator[str]:
        for what, parts, whole in (
            ("float", self.float_sum, self.fused.seconds),
            ("int8", self.int8_sum, self.int8.seconds),
        ):
            if abs(parts - whole) > _FAR * whole:
                yield (
                    f"The {what} times add up to {_ms(parts)} ms, but the model takes "
                    f"{_ms(whole)} ms as a whole: trust their order more than their sum."
                )

    def _document(self) -> dict[str, Any]:
        sites = [
            {name.removesuffix("_time"): value for name, value in plain(site).items()}
            | {"loss": site.loss}
            for site in self.sites
        ]
        return {
            **values_of(self, "ingredients", "conditions", "boundaries"),
            "whole": values_of(self, "eager", "fused", "int8"),
            "rest": {"float": self.float_rest, "int8": self.int8_rest},
            "sums": {"float": self.float_sum, "int8": self.int8_sum},
            "sites": sites,
        }

    def _bars(self) -> Sequence[Bars]:
        bars = []
        for site in self.sites:
            lengths = 1000 * site.int8_time.seconds, 1000 * site.float_time.seconds
            bars.append(Bar(site.name, f"{lengths[0]:.3f} / {lengths[1]:.3f}", lengths))
        title = "Time of each site, the worst loss first"
        return [Bars(title, bars, "milliseconds", kinds=("int8", "float"))]


def _cells(timing: Timing) -> tuple[str, str]:
    return _ms(timing.seconds), _ms(timing.spread)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3f}"


def _with_spread(timing: Timing) -> str:
    return f"{_ms(timing.seconds)} ± {_ms(timing.spread)} ms"


def _ratio(in_float: Timing, in_int8: Timing) -> str:
    """How many times as fast int8 is; nothing where noise is larger than the difference."""
    noise = in_float.spread + in_int8.spread
    if in_int8.seconds <= 0 or abs(in_float.seconds - in_int8.seconds) <= noise:
        return ""
    return f"{in_float.seconds / in_int8.seconds:.2f}"
