"""The page about a bench."""

from __future__ import annotations

from collections.abc import Iterator

from qrecipe.deployment.result import Bench
from qrecipe.execution.provenance import Provenance
from qrecipe.measure.pages import charts
from qrecipe.measure.pages.page import Figure, Page
from qrecipe.measure.pages.reports import page_about, recipe_of
from qrecipe.terminal.report import Section, Table


def bench_page(bench: Bench, origin: Provenance) -> Page:
    """Times as bars, the table, and the kernels that the runtimes report."""
    table, *results = bench._sections()
    timed = [(row.title, row.time.seconds * 1000) for row in bench.rows if row.time is not None]
    names, values = [name for name, _ in timed], [value for _, value in timed]
    drawing = charts.bars(names, values, "milliseconds")
    figure = Figure("Time of one call", drawing, f"milliseconds of {len(timed)} ways to run it")
    sections: list[Section] = [*results, figure, table, *_kernels(bench)]
    return page_about(f"Runtimes: {recipe_of(origin)}", sections, origin)


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
