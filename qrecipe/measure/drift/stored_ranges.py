"""The ranges that a converted model has stored, and where they apply."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from qrecipe.audit.float_kernels import qparams_of_result
from qrecipe.model.addresses import CALLS, is_conversion, quantizes_tensor, site_of
from qrecipe.model.nodes import module_of, stored_value
from qrecipe.planning.plan import Site
from qrecipe.recipe.schema import TensorSpec, quantized_range

TensorRole = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class QRange:
    """A scale and a zero point, and the real range that they were chosen for."""

    scale: float
    zero_point: int
    low: float
    high: float

    @classmethod
    def of(cls, scale: float, zero_point: int, limits: tuple[int, int]) -> QRange:
        """The range of the integers from ``limits[0]`` to ``limits[1]``."""
        low, high = ((limit - zero_point) * scale for limit in limits)
        return cls(scale, zero_point, low, high)

    def rounded(self, values: Tensor) -> Tensor:
        """The values rounded and clipped to the range."""
        steps = torch.round(values / self.scale) * self.scale
        return steps.clamp(self.low, self.high)

    def outside(self, values: Tensor) -> Tensor:
        """Which values are outside the range by more than half a step."""
        half = self.scale / 2
        return (values < self.low - half) | (values > self.high + half)

    def at_ends(self, values: Tensor) -> Tensor:
        """Which values are within half a step of an end, or beyond it."""
        half = self.scale / 2
        return (values < self.low + half) | (values > self.high - half)


@dataclass(frozen=True, slots=True)
class StoredRange:
    """A place where a graph quantizes with a stored scale.

    ``calibrated`` is the range of the integers that the recipe allows; ``integers`` are the limits
    of the dtype and ``possible`` is their range, beyond which kernels clip.
    """

    site: Site
    role: TensorRole
    spec: TensorSpec
    calibrated: QRange
    integers: tuple[int, int]

    def read(self, values: Tensor) -> Tensor:
        """What is read of a tensor's values."""
        limits = self.site.clamp if self.role == "output" else None
        return values if limits is None else values.clamp(*limits)

    @property
    def possible(self) -> QRange:
        return self.with_all_integers(self.calibrated)

    def with_all_integers(self, chosen: QRange) -> QRange:
        """What kernels can represent with this scale and zero point."""
        return QRange.of(chosen.scale, chosen.zero_point, self.integers)


def stored_ranges(part: fx.GraphModule, sites: Mapping[str, Site]) -> dict[fx.Node, StoredRange]:
    """Each node that quantizes to a calibrated range, in order."""
    found = {}
    for node in part.graph.nodes:
        place = _place(node, sites)
        qparams = _qparams(node) if place is not None else None
        if place is None or qparams is None:
            continue
        site, role = place
        spec = site.qconfig.activation if site.qconfig is not None else None
        limits = None if spec is None else quantized_range(spec)
        if spec is None or limits is None or is_fixed(spec):
            continue
        integers = _INTEGERS.get(str(spec.dtype), limits)
        found[node] = StoredRange(site, role, spec, QRange.of(*qparams, limits), integers)
    return found


_INTEGERS: Mapping[str, tuple[int, int]] = {
    "int4": (-128, 127),
    "uint4": (0, 255),
    "int8": (-128, 127),
    "uint8": (0, 255),
}
"""What kernels clip to: 4-bit values are stored in 8-bit types."""


def is_fixed(spec: TensorSpec) -> bool:
    """Whether the operation fixes the range, independent of the data."""
    return spec.observer is not None and spec.observer.name == "fixed_qparams"


def sharing(
    part: fx.GraphModule, ranges: Mapping[fx.Node, StoredRange], sites: Mapping[str, Site]
) -> dict[fx.Node, fx.Node]:
    """The nodes that share an observer, each with the first range of its group.

    Operations that copy share the observer of their input; those that copy several tensors join
    the observers of all.
    """
    origins: dict[fx.Node, frozenset[fx.Node]] = {}
    group: dict[fx.Node, fx.Node] = {node: node for node in ranges}
    copying: dict[fx.Node, fx.Node] = {}
    for node in part.graph.nodes:
        if node in ranges:
            origins[node] = frozenset({node})
            continue
        site = sites.get(site_of(node) or "") if node.op in CALLS else None
        is_copying = site is not None and site.verdict == "passthrough"
        if not (is_copying or is_conversion(node) or node.target is operator.getitem):
            continue
        own = frozenset().union(*(origins.get(each, ()) for each in node.all_input_nodes))
        origins[node] = own
        if not own or not is_copying or is_conversion(node):
            continue
        first = min((group[each] for each in own), key=list(ranges).index)
        merged = {group[each] for each in own}
        group = {each: first if to in merged else to for each, to in group.items()}
        copying[node] = next(iter(own))
    return {**group, **{node: group[origin] for node, origin in copying.items()}}


def _place(node: fx.Node, sites: Mapping[str, Site]) -> tuple[Site, TensorRole] | None:
    """The site whose tensor a node quantizes; None if that is not a new range."""
    if node.op not in CALLS:
        return None
    if quantizes_tensor(node):
        source = node.args[0]
        giver = sites.get(site_of(source) or "") if isinstance(source, fx.Node) else None
        if giver is not None and giver.gives_integers:  # a reference model rounds results so
            return (giver, "output") if giver.verdict == "quantized" else None
        reader = next(_readers(node, sites), None)
        return None if reader is None else (reader, "input")
    site = sites.get(site_of(node) or "")
    is_own = site is not None and site.mode == "static" and site.verdict == "quantized"
    return (site, "output") if site is not None and is_own else None


def _readers(node: fx.Node, sites: Mapping[str, Site]) -> Iterator[Site]:
    """The static sites that read a tensor, the nearest first."""
    waiting, seen = [node], {node}
    while waiting:
        for user in waiting.pop().users:
            site = sites.get(site_of(user) or "") if user.op in CALLS else None
            if site is not None and site.mode == "static" and not is_conversion(user):
                yield site
            elif user not in seen:
                seen.add(user)
                waiting.append(user)


def _qparams(node: fx.Node) -> tuple[float, int] | None:
    """The scale and zero point that a node quantizes its result with."""
    module = module_of(node)
    if module is not None:
        return _numbers(getattr(module, "scale", None), getattr(module, "zero_point", None))
    if quantizes_tensor(node):
        return _numbers(*(stored_value(argument) for argument in node.args[1:3]))
    if not str(node.target).startswith("quantized."):
        return None
    return _numbers(*(stored_value(argument) for argument in qparams_of_result(node)))


def _numbers(scale: Any, zero_point: Any) -> tuple[float, int] | None:
    try:
        return float(scale), int(zero_point)
    except (TypeError, ValueError, RuntimeError):
        return None
