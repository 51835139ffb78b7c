"""What each site and each tensor costs, and what a choice of float sites is predicted to take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from qrecipe.measure.profile.passes import input_name
from qrecipe.measure.profile.report import Profile
from qrecipe.planning.backend import FOLLOWERS
from qrecipe.planning.plan import Plan, Site
from qrecipe.rules.structure import ModelStructure, Operation


@dataclass(frozen=True, slots=True)
class SitePrice:
    """Seconds of a site in float, in float on images in channels_last, and in int8.

    ``int8`` is None for a site that stays float. ``keeps`` tells that it reads and returns
    quantized tensors in int8, ``follows`` that it is int8 only where all its ``producers`` are.
    ``precision`` is what int8 stands for here: the dtype of its weight, if it has one.
    """

    name: str
    contiguous: float
    channels_last: float
    int8: float | None
    producers: tuple[str, ...] = ()
    keeps: bool = True
    follows: bool = False
    precision: str = "int8"


@dataclass(frozen=True, slots=True)
class TensorPrice:
    """Seconds to quantize and to dequantize a tensor, once for all sites that read it.

    A tensor without a ``producer`` is an input of the model.
    """

    producer: str | None
    consumers: tuple[str, ...]
    quantize: float
    dequantize: float
    is_output: bool = False


@dataclass(frozen=True, slots=True)
class Costs:
    """All sites in order of execution, the tensors between them, and the seconds of the rest."""

    sites: tuple[SitePrice, ...]
    tensors: tuple[TensorPrice, ...]
    rest: float = 0.0

    def predicted(self, floats: Collection[str]) -> float:
        """Seconds of the model if these sites are float, besides those that stay float anyway.

        What follows one of them is float too.
        """
        floats = self.with_followers(floats)
        last = self.in_channels_last(floats)
        sites = (self._seconds(site, floats, last) for site in self.sites)
        return self.rest + sum(sites) + sum(self._conversions(floats))

    def with_followers(self, floats: Collection[str]) -> frozenset[str]:
        """These sites, and those that are float after them without a rule."""
        found = set(floats)
        for name, leaders in self._followers():
            if not found.isdisjoint(leaders):
                found.add(name)
        return frozenset(found)

    def needing_a_rule(self, floats: Collection[str]) -> frozenset[str]:
        """The ones of these sites that are not float after another one anyway."""
        chosen = frozenset(floats)
        led = (name for name, leaders in self._followers() if not chosen.isdisjoint(leaders))
        return chosen.difference(led)

    def with_penalties(self, seconds: Mapping[str, float]) -> Costs:
        """The costs as if these sites took so much longer in int8."""
        return self._with_int8(lambda site, int8: int8 + seconds.get(site.name, 0.0))

    def without_losses(self) -> Costs:
        """The costs as if no site were slower in int8 than in float."""
        return self._with_int8(lambda site, int8: min(int8, site.contiguous, site.channels_last))

    def _with_int8(self, changed: Callable[[SitePrice, float], float]) -> Costs:
        sites = (
            site if site.int8 is None else replace(site, int8=changed(site, site.int8))
            for site in self.sites
        )
        return replace(self, sites=tuple(sites))

    def in_channels_last(self, floats: Collection[str]) -> frozenset[str]:
        """The sites that get images in channels_last: those after a site that returns them so."""
        giving, getting = set[str](), set[str]()
        for site in self.sites:
            if not giving.isdisjoint(site.producers):
                getting.add(site.name)
            if site.name in getting or self._is_int8(site, floats):
                giving.add(site.name)
        return frozenset(getting)

    def _seconds(self, site: SitePrice, floats: Collection[str], last: Collection[str]) -> float:
        if site.int8 is not None and site.name not in floats:
            return site.int8
        return site.channels_last if site.name in last else site.contiguous

    def _conversions(self, floats: Collection[str]) -> Iterator[float]:
        quantized = {site.name for site in self.sites if self._is_int8(site, floats)}
        for tensor in self.tensors:
            readers = set(tensor.consumers)
            if tensor.producer not in quantized:
                yield tensor.quantize * bool(readers & quantized)
            else:
                yield tensor.dequantize * (tensor.is_output or bool(readers - quantized))

    def _followers(self) -> Iterator[tuple[str, frozenset[str]]]:
        """Each site that follows, and the sites that have to be int8 if it is."""
        for follower in self.sites:
            if follower.follows and follower.int8 is not None:
                leaders = (s for s in self.sites if s.name in follower.producers)
                yield follower.name, frozenset(s.name for s in leaders if self._is_int8(s, ()))

    @staticmethod
    def _is_int8(site: SitePrice, floats: Collection[str]) -> bool:
        return site.keeps and site.int8 is not None and site.name not in floats


def costs_of(profile: Profile, plan: Plan, structure: ModelStructure) -> Costs:
    """The costs that a profile of the plan has measured."""
    planned = {site.name: site for site in plan.sites}
    timed = {site.name: site for site in profile.sites}
    sites = []
    for operation in structure.operations:
        times, site = timed[operation.name], planned[operation.name]
        now = times.int8_time.seconds
        stays = site.verdict == "float"
        sites.append(
            SitePrice(
                operation.name,
                # what was not seen in float, or is float already, gains nothing
                now if stays else times.float_time.seconds or now,
                now if stays else times.channels_last_time.seconds or now,
                None if stays else now,
                operation.producers,
                keeps=site.gives_integers,
                follows=operation.kind in FOLLOWERS,
                precision=_precision(site),
            )
        )
    return Costs(tuple(sites), tuple(_tensors(profile, structure)), profile.int8_rest.seconds)


def _precision(site: Site) -> str:
    weight = None if site.qconfig is None else site.qconfig.weight
    return "int8" if weight is None or weight.dtype is None else weight.dtype


def _tensors(profile: Profile, structure: ModelStructure) -> Iterator[TensorPrice]:
    boundaries = {
        each.tensor: each.time.seconds
        for each in profile.boundaries
        if each.direction == "quantize"
    }
    timed = {site.name: site for site in profile.sites}
    readers, inputs = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for operation in structure.operations:
        for producer in operation.producers:
            readers[producer].append(operation.name)
        for name in operation.model_inputs:
            inputs[input_name(_path(operation, structure), name)].append(operation.name)
    for operation in structure.operations:
        name, times = operation.name, timed[operation.name]
        yield TensorPrice(
            name,
            tuple(readers[name]),
            # what stays float is quantized in the converted model already, if at all
            times.quantize_time.seconds or boundaries.get(name, 0.0),
            times.dequantize_time.seconds,
            operation.is_output,
        )
    for name, reading in inputs.items():
        yield TensorPrice(None, tuple(reading), boundaries.get(name, 0.0), 0.0)


def _path(operation: Operation, structure: ModelStructure) -> str:
    """The path of the part that an operation is in."""
    scopes = operation.members[0].scopes
    return next((path for path in scopes if path in structure.roots), "")
