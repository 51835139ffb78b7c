"""Sites that are quantized alone, each in the place that it has in a float model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe.errors.findings import AuditError
from qrecipe.errors.text import first_line
from qrecipe.model.nested import map_tensors
from qrecipe.planning.plan import Plan, Site
from qrecipe.recipe.patterns import leave_float

Calibrate = Callable[[nn.Module], None]
"""Runs a prepared model on the batches that calibrate it."""


def plan_of_one(only: Site, plan: Plan) -> Plan:
    """The plan with all other sites float."""
    as_float: dict[str, Any] = {"verdict": "float", "mode": None, "qconfig": None, "input": None}
    sites = (each if each is only else replace(each, **as_float) for each in plan.sites)
    return replace(plan, sites=tuple(sites))


@dataclass(frozen=True, slots=True)
class LoneSite:
    """A site of a float model that can be replaced.

    ``original`` computes it in float; ``owner`` calls it under one or several ``names``.
    """

    site: Site
    original: nn.Module
    owner: nn.Module
    names: tuple[str, ...]

    def put(self, module: nn.Module) -> None:
        """Make the model call ``module`` at this site."""
        for name in self.names:
            self.owner.set_submodule(name, module)

    @contextmanager
    def replaced(self, module: nn.Module) -> Iterator[None]:
        """Make the model call ``module`` at this site inside a ``with``."""
        self.put(module)
        try:
            yield
        finally:
            self.put(self.original)


@dataclass(frozen=True, slots=True)
class WrappedPart:
    """A part of a model as its float graph, with a wrapper around each site to be ranked.

    ``nodes`` call the wrappers, with the sites' own inputs in order; what is in a wrapper is a
    graph of its own.
    """

    path: str
    graph_module: fx.GraphModule
    sites: tuple[LoneSite, ...]
    nodes: Mapping[str, fx.Node]


class Kernel(nn.Module):
    """A quantized site in a float graph that returns the memory format of its input.

    Quantized convolutions return channels_last, which can halve the speed of the float rest.
    """

    def __init__(self, name: str, converted: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.converted = converted

    def forward(self, *inputs: Any, **named: Any) -> Any:
        memory_format = _memory_format(inputs)

        def formatted(value: Tensor) -> Tensor:
            is_image = value.dim() == 4
            return value.contiguous(
                memory_format=memory_format if is_image else torch.contiguous_format
            )

        try:
            result = self.converted(*inputs, **named)
        except Exception as error:
            text = f"the quantized kernel of {self.name} fails: {first_line(error)}"
            raise AuditError.of("QR413", text, hint=leave_float(self.name)) from error
        return map_tensors(formatted, result)


def _memory_format(inputs: Sequence[Any]) -> torch.memory_format:
    first = next((x for x in inputs if isinstance(x, Tensor) and x.dim() == 4), None)
    if first is None or first.is_contiguous():
        return torch.contiguous_format
    last = torch.channels_last
    return last if first.is_contiguous(memory_format=last) else torch.contiguous_format


@dataclass(frozen=True, slots=True)
class Isolated:
    """A float model that can take in one quantized site at a time.

    ``kernels`` are the quantized sites by name; ``graph`` is the graph that the model is, if it is
    one as a whole.
    """

    float_model: nn.Module
    sites: Sequence[LoneSite]
    kernels: Mapping[str, Kernel]
    graph: WrappedPart | None = None
