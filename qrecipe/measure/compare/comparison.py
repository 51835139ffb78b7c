"""The cost of quantization, site by site: a float model and the one converted from it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from torch import nn

from qrecipe.audit.sqnr import Fidelity, Totals, db_text, sqnr_text
from qrecipe.errors.findings import ExecutionError
from qrecipe.errors.short import ShortRepr
from qrecipe.errors.text import counted
from qrecipe.execution.batches import Forward, known_length, peek, rereadable
from qrecipe.execution.engine import engine_of
from qrecipe.measure.compare.pieces import comparison_log, parts_of
from qrecipe.measure.compare.run import Part, Run, Shares
from qrecipe.measure.compare.sessions import output_fidelity
from qrecipe.measure.pages.sections import Bar, Bars, sqnr_bar
from qrecipe.measure.profile.passes import Boundary
from qrecipe.measure.result import SiteResult
from qrecipe.pool.workers import Pool
from qrecipe.process.neutral import neutral
from qrecipe.recipe.recipe import Ingredient, published
from qrecipe.runtimes.table import known_session
from qrecipe.terminal.progress import Progress, chosen_progress, tracked
from qrecipe.terminal.report import Section, Table, Text, values_of


@dataclass(frozen=True, slots=True, repr=False)
class SiteComparison(ShortRepr):
    """One site in both models.

    ``weight`` is None if the weight is not quantized, ``activation`` if the output has no floating
    tensor, both if a transform has changed them that the reference lacks; the shares are of the
    total time of sites and conversions, 0 to 1.
    """

    name: str
    op: str
    verdict: str
    weight: Fidelity | None
    activation: Fidelity | None
    float_share: float
    quantized_share: float


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(SiteResult):
    """All sites, the worst activation first, and the model's own output.

    ``conversion_share`` is the share of the int8 time spent on quantizing and dequantizing;
    ``ingredients`` are the files of the recipe. ``runtime`` is that of a session, which only gives
    outputs: there are no sites then. ``lacking`` are the transforms of plugins that the reference
    has not been through.
    """

    sites: tuple[SiteComparison, ...]
    output: Fidelity | None
    batches: int
    conversion_share: float
    ingredients: tuple[Ingredient, ...] = ()
    runtime: str | None = None
    lacking: tuple[str, ...] = ()

    def _sections(self) -> Iterator[Section]:
        output = sqnr_text(None if self.output is None else self.output.sqnr_db)
        found = f"output: {output} over {counted(self.batches, 'batch')}"
        if self.runtime is not None:
            lines = [
                f"{found}, of {self.runtime}",
                "A session only returns outputs: pass the converted model to compare its sites.",
            ]
            yield Text("Result", lines)
            return
        yield self._site_table()
        if self.conversion_share:  # dynamic sites quantize their inputs themselves
            share = f"{self.conversion_share:.1%} of the int8 time"
            found = f"{found}; quantizing and dequantizing takes {share}"
        lines = [found, *published(self.ingredients)]
        if self.lacking:
            names = ", ".join(self.lacking)
            lines += [
                f"What {names} changed inside the model is not compared:",
                "pass what qrecipe.transform returns as the reference to see it too.",
            ]
        yield Text("Result", lines)

    def _site_table(self) -> Table:
        rows = [
            (
                site.name,
                site.op,
                site.verdict,
                "" if site.weight is None else db_text(site.weight.sqnr_db),
                "" if site.activation is None else db_text(site.activation.sqnr_db),
                "" if site.activation is None else f"{site.activation.mse:.2e}",
                f"{site.float_share:.1%}",
                f"{site.quantized_share:.1%}",
            )
            for site in self.sites
        ]
        header = ("site", "operation", "verdict", "weight dB", "activation dB", "MSE")
        times = ("float time", "int8 time")
        return Table("Sites", (*header, *times), rows, numeric=frozenset(range(3, 8)), spare=(1,))

    def _document(self) -> dict[str, Any]:
        names = ("ingredients", "runtime", "batches", "output", "conversion_share", "lacking")
        sites = [
            {
                **values_of(site, "name", "op", "verdict", "weight", "activation"),
                "time": {"float": site.float_share, "quantized": site.quantized_share},
            }
            for site in self.sites
        ]
        return {**values_of(self, *names), "sites": sites}

    def _bars(self) -> Sequence[Bars]:
        errors = [
            sqnr_bar(s.name, math.nan if s.activation is None else s.activation.sqnr_db)
            for s in self.sites
        ]
        shares = [
            Bar(site.name, "", (100 * site.quantized_share, 100 * site.float_share))
            for site in self.sites
        ]
        return [
            Bars("Sites by error, worst first", errors, "error", "SQNR of the activation (dB)"),
            Bars("Sites by time", shares, "share of the time (%)", kinds=("int8", "float")),
        ]


@neutral
def compare(
    reference: nn.Module,
    converted: Any,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
    pool: Executor | Pool | None = None,
) -> Comparison:
    """Compare SQNR and MSE of weights, activations and output, and the share of the time, by site.

    ``reference`` is the float model, ``converted`` the model that qrecipe made of it. Each model
    computes with its own values, so an activation includes the errors of all sites before it.
    Memory does not grow with the batches; ``batches`` and ``forward`` are as in
    `qrecipe.calibrate`. If transforms have changed the converted model, channels of the reference
    are scaled alike; what a plugin changed is compared if the reference is the model that
    `qrecipe.transform` returned.

    ``converted`` may also be an ``onnxruntime.InferenceSession`` or an ``openvino.CompiledModel``
    of an exported file. Of these only the outputs are compared. The tensors of a batch are passed
    in the order of the reference's signature.

    ``resume`` is a log that is written after each batch; if it exists, the comparison goes on from
    there. The batches are read once more for it, and kept if they come from an iterator.

    ``pool`` are workers that run the batches, any ``concurrent.futures.Executor``; all but the
    times is the same to the bit. They get the converted model as `qrecipe.save_quantized` stores
    it. See `qrecipe.Pool`.

    Raises:
        ArtifactError: ``converted`` was not converted by qrecipe (QR501), or not from a model
            like ``reference`` (QR420).
        PlanError: a plugin has transformed ``reference`` otherwise (QR342).
        CalibrationError: there are no batches, or the models cannot take one.
        ExecutionError: the workers cannot do it (QR426, QR427, QR428), a session is passed with
            ``pool`` or ``resume`` (QR425), or the log belongs to something else, or cannot be used
            (QR331, QR332).
    """
    show = chosen_progress(progress, "comparing")
    known = known_session(converted)
    if known is not None:
        runtime, session = known
        if pool is not None or resume is not None:
            name = "resume" if pool is None else "pool"
            text = f"a session of {runtime} stays in its process: compare it without {name}"
            raise ExecutionError.of("QR425", text)
        output, count = output_fidelity(reference, runtime, session, batches, forward, show)
        return Comparison((), output, count, 0.0, runtime=runtime)
    if resume is not None:
        batches = rereadable(batches)
    first, stream = peek(batches)
    run = Run(reference, converted, first, forward)
    sums = _Sums(run.weights())
    log = comparison_log(resume, run, batches)
    with closing(parts_of(run, stream, pool, log)) as parts:
        for _, part in tracked(_in_order(parts), show, known_length(batches)):
            sums.add(part)
    with engine_of(run.plan):
        before, after = run.shares(first)
    return _report(run, sums, before, after)


def _in_order(parts: Iterable[tuple[int, Part]]) -> Iterator[Part]:
    """The parts in the order of the batches; those that come early wait."""
    waiting: dict[int, Part] = {}
    index = 0
    for early, part in parts:
        waiting[early] = part
        while index in waiting:
            yield waiting.pop(index)
            index += 1


class _Sums:
    """All batches together."""

    def __init__(self, weights: Mapping[str, Fidelity | None]) -> None:
        self.batches = 0
        self.weights = weights
        self.output = Totals()
        self.activations: dict[str, Totals] = {}

    def add(self, part: Part) -> None:
        self.batches += 1
        self.output.merge(part.output)
        for name, found in part.sites.items():
            self.activations.setdefault(name, Totals()).merge(found)


def _report(run: Run, sums: _Sums, before: Shares, after: Shares) -> Comparison:
    plan, sites = run.plan, []
    for site in plan.sites:
        totals = sums.activations.get(site.name)
        quantizes_weight = site.qconfig is not None and site.qconfig.weight is not None
        sites.append(
            SiteComparison(
                site.name,
                site.op,
                site.verdict,
                sums.weights.get(site.name) if quantizes_weight else None,
                None if totals is None else totals.fidelity(),
                before.get(site.name, 0.0),
                after.get(site.name, 0.0),
            )
        )
    sites.sort(key=_worst_first)
    return Comparison(
        tuple(sites),
        sums.output.fidelity(),
        sums.batches,
        sum(share for key, share in after.items() if isinstance(key, Boundary)),
        plan.ingredients,
        lacking=run.lacking,
    )


def _worst_first(site: SiteComparison) -> tuple[bool, float]:
    value = math.inf if site.activation is None else site.activation.sqnr_db
    return (site.activation is None, -math.inf if math.isnan(value) else value)
