"""A float model and the one converted from it, run together."""

from __future__ import annotations

from collections import deque
from collections.abc import (
    Callable,
    Collection,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe._torch_ao import quiet
from qrecipe.audit.sqnr import Fidelity, Totals
from qrecipe.audit.weights import (
    float_weights,
    quantized_weights,
    weights_of_kernel,
    weights_of_module,
)
from qrecipe.execution.batches import Forward, inputs_of_batch
from qrecipe.execution.calls import calls_of
from qrecipe.execution.executors import executor_of
from qrecipe.execution.part import Realised
from qrecipe.execution.provenance import converted_graphs, provenance
from qrecipe.execution.watched import Watched, watched_modules
from qrecipe.measure.profile.passes import float_pass, int8_pass
from qrecipe.measure.turns import Pass, run_in_turn
from qrecipe.model.addresses import is_conversion
from qrecipe.model.changes import without_changes_in_place
from qrecipe.model.copies import runnable_copy, with_parts
from qrecipe.model.graph_sites import Inventory
from qrecipe.model.kept import TRANSFORMED, kept
from qrecipe.planning.inventory import inventory_of
from qrecipe.planning.plan import Limits, Plan
from qrecipe.recipe.recipe import parse_recipe
from qrecipe.transforms.record import Transformation
from qrecipe.transforms.recorded import as_recorded, different


@dataclass(slots=True)
class Activations:
    """Sums over batches for each site, fed by two models that run one after the other.

    Values of the float model are held for one batch, until the converted model has run on it.
    ``clamps`` are the limits beyond which nobody reads the result of a site; sites in ``moved`` are
    not compared.
    """

    clamps: Mapping[str, Limits]
    moved: Collection[str] = ()
    totals: dict[str, Totals] = field(default_factory=dict)

    _held: dict[str, deque[Any]] = field(default_factory=dict)

    def hold(self, name: str, value: Any) -> None:
        if name not in self.moved:
            self._held.setdefault(name, deque()).append(value)

    def match(self, name: str, value: Any) -> None:
        waiting = self._held.get(name)
        if waiting:
            pair = waiting.popleft(), value
            self.totals.setdefault(name, Totals()).add(*(self._read(name, each) for each in pair))

    def _read(self, name: str, value: Any) -> Any:
        limits = self.clamps.get(name)
        return value.clamp(*limits) if limits is not None and isinstance(value, Tensor) else value

    def forget(self) -> None:
        """Drop values that the converted model did not match."""
        self._held.clear()


Note = Callable[[str, Any], None]
"""Takes the result of a site."""


def watched(
    model: nn.Module,
    graphs: Mapping[str, fx.GraphModule],
    givers: Mapping[fx.Node, str],
    inventory: Inventory,
    note: Note,
) -> nn.Module:
    """The model with its graphs, or with its modules if it is not traced.

    ``givers`` are the nodes that give the results of sites.
    """

    def see(node: fx.Node, result: Any, seconds: float) -> None:
        if node in givers:
            note(givers[node], result)

    if inventory.untraced is not None:
        return watched_modules(model, inventory.matches, lambda name, result, _: note(name, result))
    return with_parts(model, {path: Watched(graph, see) for path, graph in graphs.items()})


def float_givers(inventory: Inventory) -> dict[fx.Node, str]:
    """The nodes of the fused float graphs: the last member of each group."""
    return {match.nodes[-1]: name for name, match in inventory.matches.items() if match.nodes}


def converted_givers(realised: Iterable[Mapping[str, Realised]]) -> dict[fx.Node, str]:
    """The nodes of the converted graphs."""
    return {
        real.result or _giver(real.node): name for sites in realised for name, real in sites.items()
    }


def _giver(node: fx.Node) -> fx.Node:
    """The node with the site's result: in a reference model the one that quantizes it again."""
    users = list(node.users)
    is_rounded = len(users) == 1 and users[0].target is torch.quantize_per_tensor
    return users[0] if is_rounded and _is_reference(node) else node


def _is_reference(node: fx.Node) -> bool:
    """Whether the node computes in float between dequantize and quantize."""
    return any(map(is_conversion, node.all_input_nodes))


_TIMED_RUNS = 5


@dataclass(frozen=True, slots=True)
class Part:
    """What one batch adds: the sums of the model's output, and those of each site."""

    output: Totals
    sites: Mapping[str, Totals]


Shares = Mapping[Hashable, float]
"""By site or boundary, its share of the time."""


def _shares(timed: Pass) -> Shares:
    """By the fastest run of each: other processes only add time."""
    least = {key: min(seconds) for key, seconds in timed.parts.seconds().items()}
    whole = sum(least.values()) or 1.0
    return {key: seconds / whole for key, seconds in least.items()}


def _changes(what: Plan | Transformation) -> tuple[Sequence[object], ...]:
    """What was done to the tensors of a model."""
    steps = [(step.name, step.changed) for step in what.steps]
    return what.chains, what.groups, steps


def _check_same(inventory: Inventory, plan: Plan, graphs: Iterable[str]) -> None:
    planned = {site.name for site in plan.sites}
    odd = planned.symmetric_difference(inventory.matches)
    if odd:
        raise different(f"only one of them has the site {min(odd)}")
    if {part.path for part in inventory.parts} != set(graphs):
        raise different("only one of them can be traced")


class Run:
    """Both models of the caller under observation, by the plan of the converted one.

    ``lacking`` are transforms of plugins that only the converted model has been through. What they
    have changed inside the model is not compared.
    """

    def __init__(
        self, reference: nn.Module, converted: nn.Module, first: Any, forward: Forward | None
    ) -> None:
        """Ready for batches like the first one.

        Raises ``ArtifactError`` if the converted model was not converted by qrecipe (QR501), or not
        from a model like the reference (QR420), and ``PlanError`` (QR342) if a plugin has
        transformed the reference otherwise.
        """
        self.reference, self.converted, self.forward = reference, converted, forward
        origin, graphs = provenance(converted), converted_graphs(converted)
        self.plan = plan = Plan.from_json(origin.plan)
        # training has changed weights, but not the sites
        recipe = replace(parse_recipe(origin.recipe), phase="ptq", executor=plan.executor)
        changes, done = _changes(plan), kept(reference, TRANSFORMED)
        is_transformed = done is not None and _changes(done) == changes
        with inputs_of_batch(reference, first, forward) as inputs:
            inventory = inventory_of(reference, recipe, inputs)
            if any(changes) and not is_transformed:
                same = as_recorded(reference, recipe, inputs, plan)
                inventory = inventory_of(same, recipe, inputs)
        _check_same(inventory, plan, graphs)
        for part in inventory.parts:
            without_changes_in_place(part.graph_module)
        self._inventory = inventory
        realised_sites = executor_of(plan.executor).realised_sites
        self._realised = {path: realised_sites(graph) for path, graph in graphs.items()}
        lacking = () if is_transformed else plan.steps
        self.lacking = tuple(step.name for step in lacking)
        self._changed = {module for step in lacking for module in step.changed}
        moved = frozenset(name for step in lacking for name in step.moved)
        self._activations = seen = Activations(plan.clamps, moved)
        floats = {part.path: part.graph_module for part in inventory.parts}
        givers = converted_givers(self._realised.values())
        self._models = (
            watched(inventory.model, floats, float_givers(inventory), inventory, seen.hold),
            watched(converted, graphs, givers, inventory, seen.match),
        )

    def part(self, batch: Any, index: int) -> Part:
        """Run both models on a batch, one after the other."""
        self._activations.totals = {}
        outputs = [
            [call.output for call in calls_of(model, batch, index, self.forward)]
            for model in self._models
        ]
        self._activations.forget()
        output = Totals()
        output.add(*outputs)
        return Part(output, self._activations.totals)

    def shares(self, batch: Any) -> tuple[Shares, Shares]:
        """Each site's share of the time that a batch takes, in float and quantized."""
        eager = runnable_copy(self.reference)
        calls = [call.inputs for call in calls_of(eager, batch, 0, self.forward)]
        before = float_pass(self._inventory, calls)
        after = int8_pass(self._inventory, self.converted, calls)
        with torch.no_grad(), quiet():
            run_in_turn([before, after], _TIMED_RUNS)
        return _shares(before), _shares(after)

    def weights(self) -> dict[str, Fidelity | None]:
        """The fidelity of each site's weights. Raises ArtifactError (QR420) if shapes differ."""
        return {
            name: _weight_fidelity(name, *pair)
            for name, pair in self._weight_pairs()
            if not self._is_changed(name)
        }

    def _is_changed(self, name: str) -> bool:
        """Whether a transform that the reference lacks has changed weights of a site."""
        opened = self._changed.intersection(self._inventory.opened)
        return any(
            module in self._changed or any(module.startswith(f"{path}.") for path in opened)
            for module in self.plan[name].modules
        )

    def _weight_pairs(self) -> Iterator[tuple[str, tuple[list[Tensor], list[Tensor]]]]:
        """The weights of each site, float and quantized."""
        for part in self._inventory.parts:
            for name, real in self._realised[part.path].items():
                node = self._inventory.matches[name].nodes[0]
                expected = float_weights(node)
                yield name, (expected, quantized_weights(real.node))
        if self._inventory.untraced is not None:
            for name in self._inventory.matches:
                expected = weights_of_module(self._inventory.model.get_submodule(name))
                yield name, (expected, weights_of_kernel(self.converted.get_submodule(name)))


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
