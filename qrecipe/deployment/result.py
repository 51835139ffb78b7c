"""What a bench says: a row for each way to run the model, and which one is the fastest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qrecipe.audit.sqnr import db_text
from qrecipe.deployment.verdict import Distances
from qrecipe.deployment.ways import Kernels, Precision, title_of
from qrecipe.errors.findings import Finding, error_from
from qrecipe.errors.short import ShortRepr
from qrecipe.errors.text import counted
from qrecipe.measure.profile.report import Conditions
from qrecipe.measure.turns import Speed, Timing
from qrecipe.recipe.recipe import Ingredient, published
from qrecipe.rules.resolution import listed
from qrecipe.runtimes.table import RUNTIMES, Name
from qrecipe.terminal.report import Listing, Result, Section, Table, Text, plain, values_of

PLACEHOLDERS = "RECIPE --model FILE.py:NAME --data FILE.py:NAME"
_SPARE = (4, 3, 8, 6)


@dataclass(frozen=True, slots=True, repr=False)
class BenchRow(ShortRepr):
    """One way to run the model.

    ``time`` is of one call, and ``speed`` compares it with torch's float model, round by round.
    ``nbytes`` is the size of the file, of torch's float model that of its tensors. ``distances``
    are of its output. ``findings`` are the errors of the audit if the output or the kernels are
    not what was planned, ``failure`` is why there is nothing to measure. ``farthest`` is the site
    that is farthest from the plan when its kernel runs alone, with its dB, if the output made it
    necessary to look.
    """

    runtime: Name
    precision: Precision
    time: Timing | None = None
    speed: Speed | None = None
    nbytes: int | None = None
    distances: Distances | None = None
    metric: float | None = None
    kernels: Kernels | None = None
    findings: tuple[Finding, ...] = ()
    farthest: tuple[str, float] | None = None
    failure: str | None = None

    @property
    def title(self) -> str:
        """``OpenVINO int8``."""
        return title_of(self.runtime, self.precision)

    @property
    def verdict(self) -> str:
        """``ok``, the code of what the audit found, or ``failed``."""
        if self.findings:
            return self.findings[0].code
        return "ok" if self.failure is None else "failed"


@dataclass(frozen=True, slots=True, repr=False)
class Bench(Result):
    """One recipe in every runtime, in float and in int8.

    ``missing`` has a line for each runtime that is not installed, with how to install it.
    ``fastest`` is the fastest row that is right, ``commands`` says by title how to write the file
    of each int8 row, and is empty if the recipe trains. ``conditions`` are what the times depend
    on.
    """

    rows: tuple[BenchRow, ...]
    missing: tuple[str, ...]
    fastest: BenchRow | None
    fastest_int8: BenchRow | None
    as_fast: tuple[str, ...]
    commands: Mapping[str, str]
    metric: str | None
    conditions: Conditions
    clock: str
    ingredients: tuple[Ingredient, ...] = ()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What the audit found, of all rows."""
        return tuple(finding for row in self.rows for finding in row.findings)

    @property
    def failures(self) -> tuple[BenchRow, ...]:
        """The rows without measurements, for reasons other than the audit's."""
        return tuple(row for row in self.rows if row.failure is not None)

    def check(self) -> None:
        """Raises ``AuditError`` if a runtime computes something other than was planned."""
        if self.findings:
            raise error_from(self.findings)

    def _sections(self) -> Iterator[Section]:
        yield self._table()
        yield Text("Result", [*self.notes, *published(self.ingredients)])
        if self.fastest_int8 is not None and self.commands:
            yield Listing("Command", f"  {self.commands[self.fastest_int8.title]}")

    def _table(self) -> Table:
        """The rows, in the order in which they were made."""
        header = [
            *("runtime", "", "ms", "±", "times float", "kB", "dB"),
            *("from plan", "int8 sites", "verdict"),
        ]
        rows = [_cells(row) for row in self.rows]
        if self.metric is not None:
            header.insert(7, self.metric)
            for cells, row in zip(rows, self.rows, strict=True):
                cells.insert(7, "" if row.metric is None else f"{row.metric:.6g}")
        numeric = frozenset(range(2, len(header) - 1))
        return Table("Runtimes", header, rows, numeric=numeric, spare=_SPARE)

    @property
    def notes(self) -> tuple[str, ...]:
        """The fastest, what the audit found, what runs in float, and the conditions."""
        return (
            *self._winners(),
            *self._audited(),
            *self._failed(),
            *self.missing,
            self._measured(),
        )

    def _winners(self) -> Iterator[str]:
        if self.fastest is None:
            yield "Nothing ran."
            return
        tied = f"; as fast within noise: {', '.join(self.as_fast)}" if self.as_fast else ""
        yield f"Fastest: {self.fastest.title}, {_ms(self.fastest.time)} ms{tied}."
        best = self.fastest_int8
        if not self.commands:
            yield "The recipe trains: export the trained model, in Python."
        elif best is not None:
            which = "Its file" if best == self.fastest else f"The fastest int8 is {best.title}: it"
            yield f"{which} is written by the command below."

    def _audited(self) -> Iterator[str]:
        for row in self.rows:
            for finding in row.findings:
                hint = "" if finding.hint is None else f" ({finding.hint})"
                yield f"{finding.code} {finding.message}{hint}"
            if row.farthest is not None and row.distances is not None:
                name, db = row.farthest
                right = f"each kernel is right alone, {name} differs most with {db:.1f} dB"
                why = "fused kernels are wrong" if row.findings else "rounding adds up"
                yield f"{row.title}: {row.distances.text}; {right}: {why}."
            if row.kernels is not None and row.kernels.in_float:
                left = listed(row.kernels.in_float)
                yield f"{row.title} computes in float what is planned in int8: {left}."

    def _failed(self) -> Iterator[str]:
        for row in self.failures:
            yield f"{row.title} failed: {row.failure}"

    def _measured(self) -> str:
        return (
            f"{self.clock} of one call: the lower quartile of "
            f"{counted(self.conditions.rounds, 'interleaved round')}, ± the distance to the upper "
            f"one. dB is the SQNR against float. {self.conditions.text}."
        )

    def _document(self) -> dict[str, Any]:
        names = ("ingredients", "metric", "as_fast", "commands", "missing")
        return {
            **values_of(self, *names),
            "conditions": {**plain(self.conditions), "clock": self.clock},
            "fastest": self.fastest and self.fastest.title,
            "fastest_int8": self.fastest_int8 and self.fastest_int8.title,
            "rows": [_row_values(row) for row in self.rows],
        }


def _row_values(row: BenchRow) -> dict[str, Any]:
    names = ("runtime", "precision", "verdict", "time", "speed", "metric", "kernels", "findings")
    return {
        **values_of(row, *names, "farthest", "failure"),
        "bytes": row.nbytes,
        "db": row.distances or {},
    }


def _cells(row: BenchRow) -> list[str]:
    found = row.distances
    return [
        RUNTIMES[row.runtime].title,
        row.precision,
        _ms(row.time),
        "" if row.time is None else f"{row.time.spread * 1000:.2f}",
        "" if row.speed is None else row.speed.text,
        "" if row.nbytes is None else f"{row.nbytes / 1000:,.0f}",
        _db(None if found is None else found.output),
        _db(None if found is None else found.from_reference),
        _made(row.kernels),
        row.verdict,
    ]


def _made(kernels: Kernels | None) -> str:
    if kernels is None or not kernels.planned:
        return ""
    return f"{kernels.planned - len(kernels.in_float)}/{kernels.planned}"


def _ms(time: Timing | None) -> str:
    return "" if time is None else f"{time.seconds * 1000:.2f}"


def _db(value: float | None) -> str:
    return "" if value is None else db_text(value)
