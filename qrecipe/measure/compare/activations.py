"""The output and time of each site in a float and a converted model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe.audit.sqnr import Totals
from qrecipe.execution.part import Realised
from qrecipe.execution.watched import Watched, watched_modules
from qrecipe.measure.profile.passes import Stopwatch
from qrecipe.model.addresses import is_conversion, site_of
from qrecipe.model.copies import with_parts
from qrecipe.model.graph_sites import Inventory
from qrecipe.planning.plan import Limits


@dataclass(slots=True)
class Activations:
    """Sums over batches for each site, fed by two models that run one after the other.

    Values of the float model are held for one batch, until the converted model has run on it.
    ``clamps`` are the limits beyond which nobody reads the result of a site; sites in ``moved`` are
    not compared, and none while it ``rests``.
    """

    clamps: Mapping[str, Limits]
    moved: Collection[str] = ()
    totals: dict[str, Totals] = field(default_factory=dict)
    rests: bool = False

    _held: dict[str, deque[Any]] = field(default_factory=dict)

    def hold(self, name: str, value: Any) -> None:
        if not self.rests and name not in self.moved:
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


Times = Stopwatch[str]
"""Seconds by site in each run of a model; the empty name is everything outside sites."""


def shares(times: Times) -> dict[str, float]:
    """Each name's share of the total, by its fastest run: other processes only add time."""
    names = {name for run in times.rounds for name in run}
    least = {name: min(times.seconds(name)) for name in names}
    whole = sum(least.values())
    return {name: value / whole for name, value in least.items()} if whole else {}


CONVERSIONS = "quantize, dequantize"
"""The name under which conversions between float and int8 are timed."""


Note = Callable[[str, Any], None]
"""Takes the result of a site."""


def watched_graphs(
    model: nn.Module,
    graphs: Mapping[str, fx.GraphModule],
    givers: Mapping[fx.Node, str],
    note: Note,
    times: Times,
) -> nn.Module:
    """The model with its graphs; ``givers`` are the nodes that give the results of sites."""

    def see(node: fx.Node, result: Any, seconds: float) -> None:
        times.add(CONVERSIONS if is_conversion(node) else site_of(node) or "", seconds)
        if node in givers:
            note(givers[node], result)

    return with_parts(model, {path: Watched(graph, see) for path, graph in graphs.items()})


def watched_sites(model: nn.Module, sites: Iterable[str], note: Note, times: Times) -> nn.Module:
    """The same for a model whose sites are its modules."""

    def see(name: str, result: Any, seconds: float) -> None:
        times.add(name, seconds)
        note(name, result)

    return watched_modules(model, sites, see)


def float_givers(inventory: Inventory) -> dict[fx.Node, str]:
    """The nodes of the fused float graphs: the last member of each group."""
    return {match.nodes[-1]: name for name, match in inventory.matches.items()}


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
