"""The page about a bench."""

from __future__ import annotations

from collections.abc import Iterator

from qrecipe.deployment.result import Bench
from qrecipe.execution.provenance import Provenance
from qrecipe.measure.pages.page import Page
from qrecipe.measure.pages.reports import About, page_about
from qrecipe.measure.pages.sections import Bar, Bars
from qrecipe.terminal.report import Section, Table


def bench_page(bench: Bench, origin: Provenance, about: About) -> Page:
    """Times as bars, the table, and the kernels that the runtimes report."""
    table, *results = bench._sections()
    timed = [(row.title, row.time.seconds * 1000) for row in bench.rows if row.time is not None]
    bars = [Bar(name, f"{value:.3g} ms", (value,)) for name, value in timed]
    drawn = Bars("Time of one call", bars, "Milliseconds of each runtime")
    sections: list[Section] = [*results, drawn, table, *_kernels(bench)]
    return page_about("bench", "Runtimes", bench.notes[0], sections, origin, about)


def _kernels(bench: Bench) -> Iterator[Section]:
    rows = [
        (row.title, operation, str(count))
        for row in bench.rows
        if row.kernels is not None
        for operation, count in row.kernels.operations.items()
    ]
    if rows:
        header = ("runtime", "operation in integers", "count")
        yield Table("Kernels that runtimes report", header, rows, numeric=frozenset({2}))
