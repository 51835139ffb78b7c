"""What each site of a float and of a converted model gives, and how long it takes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from qrecipe.execution.part import Realised
from qrecipe.measure.compare.watched import Watched
from qrecipe.measure.fidelity import Totals
from qrecipe.model.addresses import CALLS, site_of
from qrecipe.model.copies import structural_copy, with_parts
from qrecipe.model.graph_sites import Inventory

_CONVERSIONS = (torch.quantize_per_tensor, torch.quantize_per_channel, "dequantize")


@dataclass(slots=True)
class Activations:
    """Sums over batches for each site, fed by two models that run one behind the other.

    The float one is held for one batch, until the converted one has been run on it.
    """

    totals: dict[str, Totals] = field(default_factory=dict)
    _held: dict[str, deque[Any]] = field(default_factory=dict)

    def hold(self, name: str, value: Any) -> None:
        self._held.setdefault(name, deque()).append(value)

    def match(self, name: str, value: Any) -> None:
        waiting = self._held.get(name)
        if waiting:
            self.totals.setdefault(name, Totals()).add(waiting.popleft(), value)

    def forget(self) -> None:
        """Drop what no converted model answered."""
        self._held.clear()


@dataclass(slots=True)
class Times:
    """Seconds by site in each run of a model; the empty name is all that is no site's own."""

    runs: list[dict[str, float]] = field(default_factory=list)

    def start(self) -> None:
        self.runs.append({})

    def add(self, name: str, seconds: float) -> None:
        run = self.runs[-1]
        run[name] = run.get(name, 0.0) + seconds

    def shares(self) -> dict[str, float]:
        """Each name's share of the whole, by its quickest run: what else runs only adds."""
        names = {name for run in self.runs for name in run}
        least = {name: min(run.get(name, 0.0) for run in self.runs) for name in names}
        whole = sum(least.values())
        return {name: value / whole for name, value in least.items()} if whole else {}


CONVERSIONS = "quantize, dequantize"
"""The name under which the steps between float and int8 are timed."""


def watched_reference(
    model: nn.Module, inventory: Inventory, activations: Activations, times: Times
) -> nn.Module:
    """The float model with its fused graphs in place, which hold what their sites give.

    A fused group gives what its last member gives.
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
    """The converted model, whose sites answer those that `watched_reference` held."""
    givers = {_giver(real.node): name for sites in realised for name, real in sites.items()}

    def see(node: fx.Node, result: Any, seconds: float) -> None:
        is_conversion = node.op in CALLS and node.target in _CONVERSIONS
        times.add(CONVERSIONS if is_conversion else site_of(node) or "", seconds)
        if node in givers:
            activations.match(givers[node], result)

    return with_parts(converted, {path: Watched(part, see) for path, part in parts.items()})


def watched_modules(
    model: nn.Module, names: Iterable[str], keep: Callable[[str, Any], None], times: Times
) -> nn.Module:
    """An untraced model, a copy, whose named modules show what they give to ``keep``."""
    watched = structural_copy(model).eval()
    for name in names:
        started: list[float] = []
        module = watched.get_submodule(name)
        module.register_forward_pre_hook(partial(_start, started))
        module.register_forward_hook(partial(_stop, name, started, keep, times))
    return watched


def _start(started: list[float], module: nn.Module, args: Any) -> None:
    started.append(time.perf_counter())


def _stop(
    name: str,
    started: list[float],
    keep: Callable[[str, Any], None],
    times: Times,
    module: nn.Module,
    args: Any,
    output: Any,
) -> None:
    times.add(name, time.perf_counter() - started.pop())
    keep(name, output)


def _giver(node: fx.Node) -> fx.Node:
    """The node whose result is the site's: in a reference model what quantizes it again."""
    users = list(node.users)
    is_rounded = len(users) == 1 and users[0].target is torch.quantize_per_tensor
    return users[0] if is_rounded and _is_reference(node) else node


def _is_reference(node: fx.Node) -> bool:
    """Whether the node computes in float between dequantize and quantize."""
    return any(source.target == "dequantize" for source in node.all_input_nodes)
