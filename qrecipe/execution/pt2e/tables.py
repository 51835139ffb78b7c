"""Embedding tables of programs: integers, of which the rows that are looked up become float.

torchao would dequantize the whole table in each call, and knows no zero points that are float.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from qrecipe.audit.weights import SCALE, ZERO_POINT
from qrecipe.model.addresses import SITE, site_of
from qrecipe.model.nodes import free_name, stored
from qrecipe.observers.qconfig import factory
from qrecipe.planning.plan import Plan
from qrecipe.recipe.schema import TensorSpec

_aten: Any = torch.ops.aten


def store_tables(prepared: fx.GraphModule, plan: Plan) -> None:
    """Let planned embeddings look up integers, in place. Calls that share a table still do."""
    names: dict[int, str] = {}
    for lookup, spec in list(_lookups(prepared, plan)):
        weight = stored(lookup.args[0])
        if id(weight) not in names:
            names[id(weight)] = _stored(prepared, lookup, _quantized(weight, spec))
        _look_up(lookup, names[id(weight)])
    prepared.recompile()


def round_tables(reference: fx.GraphModule, plan: Plan) -> None:
    """Let planned embeddings look up the float values of their integers, in place."""
    for lookup, spec in list(_lookups(reference, plan)):
        name = free_name(reference, f"{lookup.name}_table")
        rounded = _quantized(stored(lookup.args[0]), spec).dequantize()
        reference.register_buffer(name, rounded)
        with reference.graph.inserting_before(lookup):
            lookup.update_arg(0, reference.graph.get_attr(name))
    reference.recompile()


def _lookups(program: fx.GraphModule, plan: Plan) -> Iterator[tuple[fx.Node, TensorSpec]]:
    specs = {
        site.name: site.qconfig.weight
        for site in plan.sites
        if site.mode == "weight_only" and site.qconfig is not None
    }
    for node in program.graph.find_nodes(op="call_function", target=_aten.embedding.default):
        spec = specs.get(site_of(node) or "")
        if spec is not None:
            yield node, spec


def _quantized(weight: Tensor, spec: TensorSpec) -> Tensor:
    """torch's quantized tensor, with a scale and a zero point for each row."""
    observer = factory(spec, "ptq", len(weight))()
    observer(weight.detach())
    scale, zero_point = observer.calculate_qparams()
    return torch.quantize_per_channel(weight.detach(), scale, zero_point, 0, observer.dtype)


def _stored(program: fx.GraphModule, lookup: fx.Node, table: Tensor) -> str:
    name = free_name(program, f"{lookup.name}_table")
    program.register_buffer(name, table.int_repr())
    scale, zero_point = table.q_per_channel_scales(), table.q_per_channel_zero_points()
    program.register_buffer(f"{name}{SCALE}", scale.float()[:, None])
    program.register_buffer(f"{name}{ZERO_POINT}", zero_point.float()[:, None])
    return name


def _look_up(lookup: fx.Node, table: str) -> None:
    """Let a lookup of floats be one of integers and their scales, in place."""
    graph, indices, meta = lookup.graph, lookup.args[1], dict(lookup.meta)

    def rows(name: str) -> fx.Node:
        found = graph.call_function(_aten.embedding.default, (graph.get_attr(name), indices))
        found.meta[SITE] = meta[SITE]
        return found

    with graph.inserting_before(lookup):
        integers = graph.call_function(_aten.to.dtype, (rows(table), meta["val"].dtype))
        centred = graph.call_function(_aten.sub.Tensor, (integers, rows(f"{table}{ZERO_POINT}")))
        scale = rows(f"{table}{SCALE}")
    integers.meta, centred.meta = dict(meta), dict(meta)
    lookup.target, lookup.args = _aten.mul.Tensor, (centred, scale)
