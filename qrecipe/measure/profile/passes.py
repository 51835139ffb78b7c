"""The ways in which a model is run to be timed: site by site, or as a whole."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, fx, nn

from qrecipe.execution.provenance import converted_graphs
from qrecipe.execution.watched import See, Watched, watched_modules
from qrecipe.model.addresses import is_conversion, site_of
from qrecipe.model.call import Inputs
from qrecipe.model.copies import with_parts
from qrecipe.model.graph_sites import Inventory
from qrecipe.process.threads import clock
from qrecipe.rules.structure import joined

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one run: the lower quartile over all rounds, and how far the upper one is from it.

    Other processes only add time, so what is low is nearer to the truth.
    """

    seconds: float
    spread: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(low, high - low)


NO_TIME = Timing(0.0, 0.0)


def total(timings: Iterable[Timing]) -> float:
    return sum(timing.seconds for timing in timings)


@dataclass(slots=True)
class Stopwatch(Generic[_Key]):
    """Seconds by key in each round; several times in one round add up."""

    rounds: list[dict[_Key, float]] = field(default_factory=list)

    def start_round(self) -> None:
        self.rounds.append({})

    def add(self, key: _Key, seconds: float) -> None:
        now = self.rounds[-1]
        now[key] = now.get(key, 0.0) + seconds

    def timings(self) -> dict[_Key, Timing]:
        keys = dict.fromkeys(key for each in self.rounds for key in each)
        return {key: Timing.of(self.seconds(key)) for key in keys}

    def seconds(self, key: _Key) -> list[float]:
        """The time of each round."""
        return [each.get(key, 0.0) for each in self.rounds]


Direction = Literal["quantize", "dequantize"]


@dataclass(frozen=True, slots=True)
class Boundary:
    """One tensor, named after the site that computes it or the input that it is."""

    direction: Direction
    tensor: str


def input_name(path: str, name: str) -> str:
    """The tensor that is an input of a part, the whole model (an empty path) or a root."""
    return f"input {joined(path, name)}"


def boundary_of(node: fx.Node, path: str) -> Boundary | None:
    """The boundary that a node of the converted graph at a path crosses, if it crosses one."""
    if not is_conversion(node):
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    direction: Direction = "dequantize" if node.op == "call_method" else "quantize"
    if source.op == "placeholder":
        return Boundary(direction, input_name(path, str(source.target)))
    return Boundary(direction, site_of(source) or joined(path, source.name))


Key = str | Boundary
"""A site, a boundary, or the empty name for everything else."""


@dataclass(frozen=True, slots=True)
class Pass:
    """A model that times its parts, and the calls that one batch leads to.

    ``parts`` is what the model notes, ``whole`` the time from start to end.
    """

    model: nn.Module
    calls: Sequence[Inputs]
    parts: Stopwatch[Key] = field(default_factory=Stopwatch)
    whole: Stopwatch[Key] = field(default_factory=Stopwatch)

    def run(self) -> None:
        """Run all calls once more."""
        self.parts.start_round()
        self.whole.start_round()
        now = clock()
        for inputs in self.calls:
            given = inputs.cloned()  # some models write to their inputs
            start = now()
            given.call(self.model)
            self.whole.add("", now() - start)

    def forget(self) -> None:
        """Forget the rounds so far, which warmed up."""
        self.parts.rounds.clear()
        self.whole.rounds.clear()


def float_pass(inventory: Inventory, calls: Sequence[Inputs]) -> Pass:
    """All sites in float."""
    stopwatch = Stopwatch[Key]()

    def see(node: fx.Node, result: Any, seconds: float) -> None:
        stopwatch.add(site_of(node) or "", seconds)

    if inventory.untraced is not None:
        return _module_pass(inventory.model, inventory, calls)
    parts = {part.path: Watched(part.graph_module, see) for part in inventory.parts}
    return Pass(with_parts(inventory.model, parts).eval(), calls, stopwatch)


def int8_pass(inventory: Inventory, converted: nn.Module, calls: Sequence[Inputs]) -> Pass:
    """All sites and boundaries of the converted model."""
    stopwatch = Stopwatch[Key]()

    def see_at(path: str) -> See:
        return lambda node, result, seconds: stopwatch.add(
            boundary_of(node, path) or site_of(node) or "", seconds
        )

    if inventory.untraced is not None:
        return _module_pass(converted, inventory, calls)
    return Pass(_watched(converted, see_at), calls, stopwatch)


def conversion_pass(converted: nn.Module, calls: Sequence[Inputs]) -> Pass:
    """What it takes to dequantize each quantized result, and to quantize it again."""
    stopwatch = Stopwatch[Key]()
    now = clock()

    def see(node: fx.Node, result: Any, seconds: float) -> None:
        site = None if is_conversion(node) else site_of(node)
        is_result = any(site_of(user) != site for user in node.users)
        if site is None or not is_result or not isinstance(result, Tensor):
            return
        if not result.is_quantized or result.qscheme() != torch.per_tensor_affine:
            return
        scale, zero_point = result.q_scale(), result.q_zero_point()
        start = now()
        values = result.dequantize()
        between = now()
        torch.quantize_per_tensor(values, scale, zero_point, result.dtype)
        stopwatch.add(Boundary("quantize", site), now() - between)
        stopwatch.add(Boundary("dequantize", site), between - start)

    return Pass(_watched(converted, lambda path: see), calls, stopwatch)


def _watched(converted: nn.Module, see_at: Callable[[str], See]) -> nn.Module:
    graphs = converted_graphs(converted)
    parts = {path: Watched(graph, see_at(path)) for path, graph in graphs.items()}
    return with_parts(converted, parts).eval()


def _module_pass(model: nn.Module, inventory: Inventory, calls: Sequence[Inputs]) -> Pass:
    stopwatch = Stopwatch[Key]()

    def see(path: str, result: Any, seconds: float) -> None:
        stopwatch.add(path, seconds)

    return Pass(watched_modules(model, inventory.matches, see), calls, stopwatch)


def in_channels_last(model: nn.Module, calls: Sequence[Inputs]) -> Sequence[Inputs]:
    """The calls with images in the layout that quantized convolutions return.

    They stay as they are if the model does not take them so: ``view`` may need another layout.
    """
    try:
        changed = [inputs.mapped(_channels_last) for inputs in calls]
        for inputs in changed:
            inputs.cloned().call(model)
    except Exception:  # whatever a model raises
        return calls
    return changed


def _channels_last(tensor: Tensor) -> Tensor:
    is_image = tensor.dim() == 4 and tensor.layout == torch.strided
    return tensor.contiguous(memory_format=torch.channels_last) if is_image else tensor
