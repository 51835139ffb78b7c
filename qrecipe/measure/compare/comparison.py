"""The cost of quantization, site by site: a float model and the one converted from it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from qrecipe.audit.sqnr import Fidelity, Totals, db_text, sqnr_text
from qrecipe.audit.weights import (
    float_weights,
    quantized_weights,
    weights_of_kernel,
    weights_of_module,
)
from qrecipe.errors.short import ShortRepr
from qrecipe.errors.text import counted
from qrecipe.execution.batches import Forward, inputs_of_batch, known_length, limited, peek
from qrecipe.execution.calls import noted_calls, run_quietly
from qrecipe.execution.engine import engine_of
from qrecipe.execution.executors import executor_of
from qrecipe.execution.part import Realised
from qrecipe.execution.provenance import converted_graphs, provenance
from qrecipe.measure.compare.activations import (
    CONVERSIONS,
    Activations,
    Times,
    shares,
    watched_converted,
    watched_reference,
)
from qrecipe.measure.compare.sessions import output_fidelity
from qrecipe.measure.watched import watched_modules
from qrecipe.model.graph_sites import Inventory
from qrecipe.model.kept import TRANSFORMED, kept
from qrecipe.model.out_of_place import without_changes_in_place
from qrecipe.planning.inventory import inventory_of
from qrecipe.planning.plan import Limits, Plan
from qrecipe.process.neutral import neutral
from qrecipe.recipe.recipe import Ingredient, parse_recipe, published
from qrecipe.runtimes.table import known_session
from qrecipe.terminal.progress import Progress, chosen_progress, tracked
from qrecipe.terminal.report import Report, Section, Table, Text
from qrecipe.transforms.transform import as_recorded, different

_TIMED_RUNS = 5


@dataclass(frozen=True, slots=True, repr=False)
class SiteComparison(ShortRepr):
    """One site in both models.

    ``weight`` is None if the weight is not quantized, ``activation`` if the output has no floating
    tensor; the shares are of the total time of sites and conversions, 0 to 1.
    """

    name: str
    op: str
    verdict: str
    weight: Fidelity | None
    activation: Fidelity | None
    float_share: float
    quantized_share: float


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(Report):
    """All sites, the worst activation first, and the model's own output.

    ``conversion_share`` is the share of the int8 time spent on quantizing and dequantizing;
    ``ingredients`` are the files of the recipe. ``runtime`` is that of a session, which only gives
    outputs: there are no sites then.
    """

    sites: tuple[SiteComparison, ...]
    output: Fidelity | None
    batches: int
    conversion_share: float
    ingredients: tuple[Ingredient, ...] = ()
    runtime: str | None = None

    def _sections(self) -> Iterator[Section]:
        output = sqnr_text(None if self.output is None else self.output.sqnr_db)
        found = f"output: {output} over {counted(self.batches, 'batch')}"
        if self.runtime is not None:
            lines = [
                f"{found}, of {self.runtime}",
                "A session gives outputs alone: pass the converted model to compare its sites.",
            ]
            yield Text("Result", lines)
            return
        yield self._site_table()
        summary = (
            f"{found}; quantizing and dequantizing takes {self.conversion_share:.1%} of the int8 "
            "time"
        )
        yield Text("Result", [summary, *published(self.ingredients)])

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

    def to_json(self) -> str:
        """JSON with stable keys; the SQNR of equal tensors is null, with ``"exact": true``."""
        document = {
            "ingredients": [each.to_json() for each in self.ingredients],
            "runtime": self.runtime,
            "batches": self.batches,
            "output": _json(self.output),
            "conversion_share": self.conversion_share,
            "sites": [
                {
                    "name": site.name,
                    "op": site.op,
                    "verdict": site.verdict,
                    "weight": _json(site.weight),
                    "activation": _json(site.activation),
                    "time": {"float": site.float_share, "quantized": site.quantized_share},
                }
                for site in self.sites
            ],
        }
        return json.dumps(document, indent=2)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plot the error and the share of the time of each site.

        The suffix of ``path`` sets the format.

        Raises ``QRecipeError`` (QR602) if matplotlib is missing.
        """
        from qrecipe.measure.pages.charts import plot_comparison

        plot_comparison(self, path)


def _json(fidelity: Fidelity | None) -> dict[str, Any] | None:
    return None if fidelity is None else fidelity.to_json()


@neutral
def compare(
    reference: nn.Module,
    converted: Any,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    progress: Progress | bool | None = None,
) -> Comparison:
    """Compare SQNR and MSE of weights, activations and output, and the share of the time, by site.

    ``reference`` is the float model, ``converted`` the model that qrecipe made of it. Each model
    computes with its own values, so an activation includes the errors of all sites before it.
    Memory does not grow with the batches; ``batches`` and ``forward`` are as in
    `qrecipe.calibrate`.

    ``converted`` may also be an ``onnxruntime.InferenceSession`` or an ``openvino.CompiledModel``
    of an exported file. Of these only the outputs are compared. The tensors of a batch are passed
    in the order of the reference's signature.

    Raises:
        ArtifactError: ``converted`` was not converted by qrecipe (QR501), or not from a model
            like ``reference`` (QR420).
        CalibrationError: there are no batches, or the models cannot take one.
    """
    show = chosen_progress(progress, "comparing")
    known = known_session(converted)
    if known is not None:
        runtime, session = known
        output, count = output_fidelity(reference, session, batches, forward, show)
        return Comparison((), output, count, 0.0, runtime=runtime)
    origin, graphs = provenance(converted), converted_graphs(converted)
    plan = Plan.from_json(origin.plan)
    # training has changed weights, but not the sites
    recipe = replace(parse_recipe(origin.recipe), phase="ptq", executor=plan.executor)
    first, stream = peek(batches)
    with inputs_of_batch(reference, first, forward) as inputs:
        inventory = inventory_of(reference, recipe, inputs)
        done = kept(reference, TRANSFORMED)
        changes = (plan.chains, plan.groups)
        if any(changes) and (done is None or (done.chains, done.groups) != changes):
            reference = as_recorded(reference, recipe, inputs, plan)
            inventory = inventory_of(reference, recipe, inputs)
    _check_same(inventory, plan, graphs)
    for part in inventory.parts:
        without_changes_in_place(part.graph_module)
    realised_sites = executor_of(plan.executor).realised_sites
    realised = {path: realised_sites(graph) for path, graph in graphs.items()}
    run = _Run(converted, inventory, graphs, realised, plan.clamps, forward)
    weights = run.weights()
    with engine_of(plan):
        count = 0
        for index, batch in tracked(limited(stream), show, known_length(batches)):
            run.batch(batch, index)
            count = index + 1
        run.time(first)
    return run.report(plan, weights, count)


def _check_same(inventory: Inventory, plan: Plan, graphs: Iterable[str]) -> None:
    planned = {site.name for site in plan.sites}
    odd = planned.symmetric_difference(inventory.matches)
    if odd:
        raise different(f"only one of them has the site {min(odd)}")
    if {part.path for part in inventory.parts} != set(graphs):
        raise different("only one of them can be traced")


class _Run:
    """Both models under observation."""

    def __init__(
        self,
        converted: nn.Module,
        inventory: Inventory,
        graphs: Mapping[str, fx.GraphModule],
        realised: Mapping[str, Mapping[str, Realised]],
        clamps: Mapping[str, Limits],
        forward: Forward | None,
    ) -> None:
        self._inventory = inventory
        self._graphs = graphs
        self._realised = realised
        self._forward = forward
        self._output = Totals()
        self._activations = Activations(clamps)
        self._times = (Times(), Times())
        reference = inventory.model
        self._raw = (reference, converted)
        seen, (before, after) = self._activations, self._times
        if inventory.untraced is None:
            self._models = (
                watched_reference(reference, inventory, seen, before),
                watched_converted(graphs, realised.values(), converted, seen, after),
            )
        else:
            names = list(inventory.matches)

            def see_reference(name: str, result: Any, seconds: float) -> None:
                before.add(name, seconds)
                seen.hold(name, result)

            def see_converted(name: str, result: Any, seconds: float) -> None:
                after.add(name, seconds)
                seen.match(name, result)

            self._models = (
                watched_modules(reference, names, see_reference),
                watched_modules(converted, names, see_converted),
            )

    def batch(self, batch: Any, index: int) -> None:
        outputs = []
        for model, times in zip(self._models, self._times, strict=True):
            times.start_round()
            with noted_calls(model) as calls:
                run_quietly(model, batch, index, self._forward)
            outputs.append([call.output for call in calls])
        self._output.add(*outputs)
        self._activations.forget()

    def time(self, batch: Any) -> None:
        """Measure the time once more, now that everything is warm."""
        counted, self._activations.totals = self._activations.totals, {}
        for times in self._times:
            times.rounds.clear()
        for _ in range(_TIMED_RUNS):
            for model, times in zip(self._models, self._times, strict=True):
                times.start_round()
                run_quietly(model, batch, 0, self._forward)
            self._activations.forget()
        self._activations.totals = counted

    def report(self, plan: Plan, weights: Mapping[str, Fidelity | None], count: int) -> Comparison:
        before, after = (shares(times) for times in self._times)
        sites = []
        for site in plan.sites:
            totals = self._activations.totals.get(site.name)
            quantizes_weight = site.qconfig is not None and site.qconfig.weight is not None
            sites.append(
                SiteComparison(
                    site.name,
                    site.op,
                    site.verdict,
                    weights.get(site.name) if quantizes_weight else None,
                    None if totals is None else totals.fidelity(),
                    before.get(site.name, 0.0),
                    after.get(site.name, 0.0),
                )
            )
        sites.sort(key=_worst_first)
        return Comparison(
            tuple(sites),
            self._output.fidelity(),
            count,
            after.get(CONVERSIONS, 0.0),
            plan.ingredients,
        )

    def weights(self) -> dict[str, Fidelity | None]:
        """The fidelity of each site's weights. Raises ArtifactError (QR420) if shapes differ."""
        return {name: _weight_fidelity(name, *pair) for name, pair in self._weight_pairs()}

    def _weight_pairs(self) -> Iterator[tuple[str, tuple[list[Tensor], list[Tensor]]]]:
        """The weights of each site, float and quantized."""
        for part in self._inventory.parts:
            for name, real in self._realised[part.path].items():
                node = self._inventory.matches[name].nodes[0]
                expected = float_weights(node, part.graph_module)
                yield name, (expected, quantized_weights(real.node, self._graphs[part.path]))
        if self._inventory.untraced is not None:
            reference, quantized = self._raw
            for name in self._inventory.matches:
                expected = weights_of_module(reference.get_submodule(name))
                yield name, (expected, weights_of_kernel(quantized.get_submodule(name)))


def _weight_fidelity(
    name: str, reference: list[Tensor], candidate: list[Tensor]
) -> Fidelity | None:
    for expected, actual in zip(reference, candidate, strict=False):
        if expected.shape != actual.shape:
            shapes = f"{list(expected.shape)} and {list(actual.shape)}"
            raise different(f"the weights of {name} have the shapes {shapes}")
    totals = Totals()
    totals.add(reference, candidate)
    return totals.fidelity()


def _worst_first(site: SiteComparison) -> tuple[bool, float]:
    value = math.inf if site.activation is None else site.activation.sqnr_db
    return (site.activation is None, -math.inf if math.isnan(value) else value)
