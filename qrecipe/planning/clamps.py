"""Sites whose results are only read between limits: their range needs no more than that.

A clamp shares the observer of its input. If that observed values before the clamp, most integers
of its range would represent values that the clamp cuts off.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qrecipe.model.graph_sites import Inventory, Match
from qrecipe.model.moving import averages, moves
from qrecipe.planning.backend import Outcome
from qrecipe.planning.plan import Limits
from qrecipe.rules.resolution import listed
from qrecipe.rules.structure import Operation

_KEEPS_ORDER = frozenset(
    {
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d),
        *(torch.cat, torch.stack, torch.flatten, torch.reshape, "reshape", "contiguous"),
    }
)
"""Operations that a clamp may come before or after: it makes no difference."""

_FUNCTIONS: Mapping[Any, tuple[tuple[float, float], tuple[str, ...]]] = {
    **dict.fromkeys((F.relu, torch.relu, "relu", "relu_"), ((0.0, inf), ())),
    **dict.fromkeys((F.relu6, "relu6"), ((0.0, 6.0), ())),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), ((-1.0, 1.0), ("min_val", "max_val"))),
    **dict.fromkeys((torch.clamp, "clamp", "clamp_"), ((-inf, inf), ("min", "max"))),
    **dict.fromkeys((torch.clamp_min, "clamp_min", "clamp_min_"), ((-inf, inf), ("min",))),
    **dict.fromkeys((torch.clamp_max, "clamp_max", "clamp_max_"), ((-inf, inf), ("max",))),
}
"""The limits of functions and methods, and the names of the arguments that set them."""


@dataclass(frozen=True, slots=True)
class Clamp:
    """The limits between which a site's result is read, and the sites that clamp it there."""

    low: float
    high: float
    by: tuple[str, ...]

    @property
    def limits(self) -> Limits:
        return (
            self.low if isfinite(self.low) else None,
            self.high if isfinite(self.high) else None,
        )

    @property
    def reason(self) -> str:
        clamps = "which clamps it" if len(self.by) == 1 else "which clamp it"
        return f"with the range of {listed(self.by)}, {clamps}"

    def before(self, later: Clamp) -> Clamp:
        """Both, one after the other."""
        low, high = (min(max(end, later.low), later.high) for end in (self.low, self.high))
        return Clamp(low, high, (*self.by, *later.by))


def clamps(inventory: Inventory, outcome_of: Mapping[str, Outcome]) -> Mapping[str, Clamp]:
    """The static sites that only clamps read, quantized or float."""
    operations = inventory.structure.operations
    readers: dict[str, list[str]] = defaultdict(list)
    for operation in operations:
        for producer in operation.producers:
            readers[producer].append(operation.name)
    wider: set[str] = set()
    while True:
        found: dict[str, Clamp] = {}
        for operation in reversed(operations):
            read = [_read(inventory.matches[each], found) for each in readers[operation.name]]
            known = [each for each in read if each is not None]
            is_whole = operation.is_output or operation.name in wider or len(known) < len(read)
            if known and not is_whole:
                by = tuple(dict.fromkeys(name for each in known for name in each.by))
                lows, highs = [each.low for each in known], [each.high for each in known]
                widest = Clamp(min(lows), max(highs), by)
                if widest.limits != (None, None):
                    found[operation.name] = widest
        static = {name for name in found if outcome_of[name].rounded is not None}
        more = _sharing_a_wider_range(operations, outcome_of, static)
        if not more:
            fixed = {each.name for each in operations if each.kind == "fixed_qparams"}
            return {name: found[name] for name in found if name in static - fixed}
        wider |= more


def _sharing_a_wider_range(
    operations: Sequence[Operation], outcome_of: Mapping[str, Outcome], clamped: Collection[str]
) -> set[str]:
    """The sites that follow one that is read without limits, and so share its range."""
    found: set[str] = set()
    for operation in operations:
        shares = outcome_of[operation.name].verdict == "passthrough" and operation.name in clamped
        if shares and any(each in found or each not in clamped for each in operation.producers):
            found.add(operation.name)
    return found


def _read(reader: Match, later: Mapping[str, Clamp]) -> Clamp | None:
    """The limits between which a site reads its input."""
    own, after = limits_of(reader), later.get(reader.operation.name)
    if own is None:
        return after if _keeps_order(reader) else None
    clamp = Clamp(*own, (reader.operation.name,))
    return clamp if after is None else clamp.before(after)


def _keeps_order(match: Match) -> bool:
    node = match.nodes[0]
    called = type(match.module) if node.op == "call_module" else node.target
    only_moves = any(map(moves, match.nodes)) and not any(map(averages, match.nodes))
    return called in _KEEPS_ORDER or only_moves


def limits_of(match: Match) -> tuple[float, float] | None:
    """The numbers that an operation clamps its input between, None if it does something else."""
    node, module = match.nodes[0], match.module
    if isinstance(module, nn.Hardtanh):  # ReLU6 too
        return float(module.min_val), float(module.max_val)
    if isinstance(module, nn.ReLU):
        return 0.0, inf
    if module is not None or node.target not in _FUNCTIONS:
        return None
    (low, high), names = _FUNCTIONS[node.target]
    given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    for name in names:
        value = given.get(name)
        if isinstance(value, (int, float)):
            low, high = (low, float(value)) if "max" in name else (float(value), high)
        elif value is not None:
            return None  # a tensor
    return min(low, high), high  # where they are crossed, everything becomes the upper one
