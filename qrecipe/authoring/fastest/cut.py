"""The choice of float sites that is predicted to take least: a minimum cut.

Sites on the source's side are int8, those on the sink's side float. An edge costs its capacity if
it goes from the one side to the other, so each price is an edge, and the cheapest cut is the
cheapest choice (Stone, "Multiprocessor Scheduling with the Aid of Network Flow Algorithms", 1977).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import networkx
from networkx.algorithms.flow import boykov_kolmogorov

from qrecipe.authoring.fastest.costs import Costs

LEAST_GAIN = 0.1
"""The share of time that leaving something float has to save by prediction."""

_INT8, _FLOAT = "int8", "float"
_MOST_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Mixture:
    """A choice of sites to leave float, besides those that stay float anyway.

    ``gain`` is the share of time that it saves by prediction, ``failure`` says why a model could
    not be quantized so.
    """

    floats: frozenset[str]
    gain: float
    failure: str | None = None

    @property
    def is_promising(self) -> bool:
        """Whether it is worth measuring."""
        return self.gain >= LEAST_GAIN


def mixture_of(costs: Costs) -> Mixture:
    """The choice that is cheapest by prediction."""
    floats, before = cheapest(costs), costs.predicted(())
    return Mixture(floats, 1 - costs.predicted(floats) / before if before else 0.0)


def cheapest(costs: Costs, margin: float = LEAST_GAIN) -> frozenset[str]:
    """The sites to leave float besides those that stay float anyway.

    A site is moved only if float saves more than ``margin`` of its time in int8.

    The layouts that float sites get depend on the choice, and their times on the layouts. So the
    cut is repeated with the layouts of the one before, and the best by prediction is returned.
    """
    tried: list[frozenset[str]] = []
    layouts = costs.in_channels_last(())
    for _ in range(_MOST_ROUNDS):
        tried.append(_minimum_cut(costs, layouts, margin))
        before, layouts = layouts, costs.in_channels_last(tried[-1])
        if layouts == before:
            break
    return min(tried, key=costs.predicted)


class _Network:
    """Edges between sites and tensors, with nanoseconds for capacities: integers, so exact."""

    def __init__(self) -> None:
        self.graph = networkx.DiGraph()
        self.graph.add_nodes_from((_INT8, _FLOAT))

    def price(self, source: object, sink: object, seconds: float) -> None:
        """Charge for ``source`` on the side of int8 and ``sink`` on the other."""
        capacity = round(seconds * 1e9)
        if self.graph.has_edge(source, sink):
            capacity += self.graph.edges[source, sink].get("capacity", 0)
        self.graph.add_edge(source, sink, capacity=capacity)

    def forbid(self, source: object, sink: object) -> None:
        """Let ``source`` be on the side of int8 only if ``sink`` is: no limit on the capacity."""
        self.graph.add_edge(source, sink)


def _minimum_cut(costs: Costs, in_channels_last: Collection[str], margin: float) -> frozenset[str]:
    network = _Network()
    movable = [site for site in costs.sites if site.int8 is not None]
    quantized = {site.name for site in movable if site.keeps}
    for site in movable:
        assert site.int8 is not None
        in_float = site.channels_last if site.name in in_channels_last else site.contiguous
        network.price(_INT8, _site(site.name), in_float)
        network.price(_site(site.name), _FLOAT, site.int8 * (1 - margin))
        if site.follows:
            for producer in quantized.intersection(site.producers):
                network.forbid(_site(site.name), _site(producer))
    for number, tensor in enumerate(costs.tensors):
        giver = _site(tensor.producer) if tensor.producer in quantized else _FLOAT
        read_in_int8, read_in_float = ("int8", number), ("float", number)
        for reader in quantized.intersection(tensor.consumers):
            network.forbid(_site(reader), read_in_int8)
            network.forbid(read_in_float, _site(reader))
        network.price(read_in_int8, giver, tensor.quantize)
        if giver != _FLOAT:
            network.price(giver, read_in_float, tensor.dequantize)
            if tensor.is_output or not quantized.issuperset(tensor.consumers):
                network.forbid(read_in_float, _FLOAT)
    _, (_, floats) = networkx.minimum_cut(network.graph, _INT8, _FLOAT, flow_func=boykov_kolmogorov)
    return frozenset(site.name for site in movable if _site(site.name) in floats)


def _site(name: str | None) -> tuple[str, str | None]:
    return "site", name
