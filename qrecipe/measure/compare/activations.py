"""The output and time of each site in a float and a converted model."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe.audit.sqnr import Totals
from qrecipe.execution.part import Realised
from qrecipe.execution.watched import Watched
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


def watched_reference(
    model: nn.Module, inventory: Inventory, activations: Activations, times: Times
) -> nn.Module:
    """The float model with its fused graphs, which hold the outputs of their sites.

    The output of a fused group is that of its last member.
    """
    last = {match.nodes[-1]: name for name, match in inventory.matches.items()}

    def see(node: fx.Node, result: Any, seconds: float) -> None:
        times.add(site_of(node) or "", seconds)
        if node in last:
            activations.hold(last[node], result)

    parts = {part.path: Watched(part.graph_module, see) for part in inventory.parts}
    return with_parts(model, parts)


def watched_converted(
    parts: Mapping[str, fx.GraphModule],
    realised: Iterable[Mapping[str, Realised]],
    converted: nn.Module,
    activations: Activations,
    times: Times,
) -> nn.Module:
    """The converted model, whose sites match those that `watched_reference` held."""
    givers = {
        real.result or _giver(real.node): name for sites in realised for name, real in sites.items()
    }

    def see(node: fx.Node, result: Any, seconds: float) -> None:
        times.add(CONVERSIONS if is_conversion(node) else site_of(node) or "", seconds)
        if node in givers:
            activations.match(givers[node], result)

    return with_parts(converted, {path: Watched(part, see) for path, part in parts.items()})


def _giver(node: fx.Node) -> fx.Node:
    """The node with the site's result: in a reference model the one that quantizes it again."""
    users = list(node.users)
    is_rounded = len(users) == 1 and users[0].target is torch.quantize_per_tensor
    return users[0] if is_rounded and _is_reference(node) else node


def _is_reference(node: fx.Node) -> bool:
    """Whether the node computes in float between dequantize and quantize."""
    return any(map(is_conversion, node.all_input_nodes))
