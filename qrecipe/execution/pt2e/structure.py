"""The structural audit: each edge of a converted program against the plan, without data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from qrecipe.audit.modules import differs
from qrecipe.audit.weights import quantized_weights
from qrecipe.errors.findings import Finding
from qrecipe.execution.pt2e.operands import (
    constant_nodes,
    gives_integers,
    gives_tensor,
    input_spec,
    is_float,
    is_static,
    nodes_of_sites,
    operands,
)
from qrecipe.model.addresses import site_of
from qrecipe.model.nodes import stored_value
from qrecipe.planning.plan import Plan, Site
from qrecipe.recipe.schema import TensorSpec, quantized_range


@dataclass(frozen=True, slots=True)
class Grid:
    """The integers that a tensor is rounded to, and what they stand for.

    Scale and zero point are empty if they are computed from the tensor in each call.
    """

    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    low: int
    high: int
    axis: int | None

    def __str__(self) -> str:
        per = "per tensor" if self.axis is None else "per channel"
        return f"{self.low}..{self.high} {per}{'' if self.scale else ' and call'}"


def grid_of(node: fx.Node) -> Grid | None:
    """The grid of a node that quantizes or dequantizes; None for any other node."""
    name = str(node.target)
    if node.op != "call_function" or not name.startswith("quantized_decomposed."):
        return None
    _, scale, zero_point, *rest = node.args
    axis = rest.pop(0) if "per_channel" in name else None
    low, high = rest[:2]
    return Grid(_values(scale), _values(zero_point), low, high, axis)  # type: ignore[arg-type]


def _values(argument: Any) -> tuple[Any, ...]:
    value = stored_value(argument)
    if value is None:
        return ()
    return tuple(value.flatten().tolist()) if isinstance(value, Tensor) else (value,)


def is_quantize(node: fx.Node) -> bool:
    return str(node.target).startswith("quantized_decomposed.quantize_per_")


def structure_findings(
    plan: Plan, program: fx.GraphModule, converted: fx.GraphModule
) -> Iterator[Finding]:
    """Where the conversion of a program differs from the plan (QR410).

    What depends on no input is a constant of the converted program.
    """
    constant = constant_nodes(program)
    before = nodes_of_sites(program, plan)
    sites = {site.name: site for site in plan.sites}
    for name, nodes in nodes_of_sites(converted, plan).items():
        site, own = sites[name], [node for node in nodes if grid_of(node) is None]
        expected = site.mode or "float"
        may_do_nothing = bool(before[name]) or site.verdict != "quantized"
        if not own and may_do_nothing and constant.issuperset(before[name]):
            continue
        if not own:
            yield differs(site, expected, "vanished")
            continue
        audit = _SiteAudit(site, own, sites, input_spec(site, plan))
        problem = next(audit.problems(), None)
        if problem is not None:
            yield differs(site, expected, problem)


@dataclass(frozen=True, slots=True)
class _SiteAudit:
    """What is wrong with the edges of one site; ``input_spec`` is that of what it quantizes."""

    site: Site
    nodes: Sequence[fx.Node]
    sites: Mapping[str, Site]
    input_spec: TensorSpec | None

    def problems(self) -> Iterator[str]:
        grids: set[Grid] = set()
        if self.site.mode == "weight_only" and not any(map(quantized_weights, self.nodes)):
            yield "its weight is float"
        for node in self.nodes:
            for source, role in operands(node):
                if role == "weight":
                    yield from self._weight_problems(source)
                elif role == "parameter" and grid_of(source) is not None:
                    yield f"{source.args[0]}, a parameter that stays float, is quantized"
                elif role == "data" and source not in self.nodes:
                    yield from self._input_problems(source)
                    grids |= {grid for grid in (grid_of(source),) if grid}
            if self.site.gives_integers and gives_tensor(node):
                yield from self._output_problems(node, grids)
        if self.site.verdict == "passthrough" and len(grids) > 1:
            yield "the tensors that share a scale have several"

    def _weight_problems(self, source: fx.Node) -> Iterator[str]:
        spec = self.site.qconfig.weight if self.site.qconfig else None
        grid = grid_of(source)
        yield from _unlike(spec, grid, "its weight")
        if grid is not None and source.args[0].op != "get_attr":  # type: ignore[union-attr]
            yield "its weight is quantized in every call"

    def _input_problems(self, source: fx.Node) -> Iterator[str]:
        """A float site reads what its producer gives; others read integers."""
        grid = grid_of(source)
        if self.site.mode == "dynamic":
            yield from _unlike(self.input_spec, grid, "its input")
            if grid is not None and not _is_of_its_own(source):
                yield f"the range of {source} is not that of the call"
            return
        if grid is None:
            # a module is an observer that was left in
            if is_static(self.site) and (is_float(source) or source.op == "call_module"):
                yield f"reads {source}, which is float"
            return
        producer = self._producer(source)
        if gives_integers(producer):
            assert producer is not None
            assert producer.qconfig is not None
            yield from _unlike(producer.qconfig.activation, grid, "its input")
        elif is_static(self.site):
            assert self.site.qconfig is not None
            yield from _unlike(self.site.qconfig.activation, grid, "its input")
        else:
            yield f"reads {source}, which was rounded"

    def _producer(self, source: fx.Node) -> Site | None:
        """The site whose result was quantized and dequantized here."""
        node: Any = source
        while isinstance(node, fx.Node) and grid_of(node) is not None:
            node = node.args[0]
        return self.sites.get(site_of(node) or "") if isinstance(node, fx.Node) else None

    def _output_problems(self, node: fx.Node, grids: set[Grid]) -> Iterator[str]:
        outside = [user for user in node.users if user not in self.nodes]
        quantizing = [user for user in outside if is_quantize(user)]
        assert self.site.qconfig is not None
        if len(quantizing) < len(outside):
            yield "its result is read as float"
        if len(quantizing) > 1:
            yield "its result is quantized more than once"
        for user in quantizing:
            grid = grid_of(user)
            yield from _unlike(self.site.qconfig.activation, grid, "its result")
            grids |= {grid} if grid else set()


def _is_of_its_own(dequantize: fx.Node) -> bool:
    """Whether a tensor is rounded to a grid that is computed from it."""
    quantize: Any = dequantize.args[0]
    sources = {node.args[0] for node in quantize.args[1:3] if isinstance(node, fx.Node)}
    (chosen,) = sources if len(sources) == 1 else (None,)
    return (
        isinstance(chosen, fx.Node)
        and "choose_qparams" in str(chosen.target)
        and chosen.args[:3] == (quantize.args[0], *quantize.args[3:5])
    )


def _unlike(spec: TensorSpec | None, grid: Grid | None, what: str) -> Iterator[str]:
    if spec is None or grid is None:
        if (spec is None) != (grid is None):
            yield f"{what} is {'float' if grid is None else f'rounded to {grid}'}"
        return
    low_high = quantized_range(spec)
    if (grid.low, grid.high) != low_high or (grid.axis is None) != spec.is_per_tensor:
        yield f"{what} is rounded to {grid}"
