"""The structural audit: which class or kernel each site became, without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from qrecipe._torch_fx import (
    is_copy_node,
    is_fixed_qparams_node,
    is_general_tensor_shape_node,
    is_other_node,
)
from qrecipe.audit.modules import differs, weight_problem
from qrecipe.errors.findings import Finding
from qrecipe.execution.packing import Kinds
from qrecipe.execution.part import Realised
from qrecipe.model.addresses import CALLS, carries_data, is_conversion, site_of
from qrecipe.model.moving import PIECE, moves
from qrecipe.model.quantized import Became, module_became
from qrecipe.planning.plan import Plan

_KEEPING_CHECKS: tuple[Callable[..., tuple[bool, bool, bool]], ...] = (
    is_copy_node,
    is_fixed_qparams_node,
    is_general_tensor_shape_node,
    is_other_node,
)


def realised_sites(converted: fx.GraphModule) -> dict[str, Realised]:
    """What each site became; a site that conversion removed is missing.

    Of several nodes of a site, the most telling one counts: leftover, quantized, float.
    """
    modules = dict(converted.named_modules(remove_duplicate=False))
    quantized: set[fx.Node] = set()
    found: dict[str, Realised] = {}
    for node in converted.graph.nodes:
        became = _became(node, modules, quantized)
        if became == "static":
            quantized.add(node)
        name = site_of(node)
        if name is None or node.op not in CALLS or is_conversion(node):
            continue
        real = Realised(became, node)
        if name not in found or _telling(real) >= _telling(found[name]):
            found[name] = real
    return found


_WEIGHT = {"float": 0, "static": 1, "dynamic": 1, "weight_only": 1, "leftover": 2}


def _telling(real: Realised) -> int:
    """How much a node says of its site: one of several results that stays float says it all."""
    is_float_piece = real.became == "float" and PIECE in real.node.meta
    return _WEIGHT["leftover" if is_float_piece else real.became]


def _became(node: fx.Node, modules: dict[str, nn.Module], quantized: set[fx.Node]) -> Became:
    if node.target is torch.quantize_per_tensor:
        return "static"
    if node.op not in CALLS or is_conversion(node):
        return "float"
    if node.op == "call_module":
        became = module_became(modules[str(node.target)])
    else:
        became = _function_became(node.target)
    if became == "float" and _keeps_quantized(node, modules):
        sources = [source for source in node.all_input_nodes if carries_data(source)]
        return "static" if sources and all(n in quantized for n in sources) else "float"
    return became


def _function_became(target: Any) -> Became:
    name = str(target)
    if not name.startswith("quantized."):
        return "float"
    return "dynamic" if "_dynamic" in name else "static"


def _keeps_quantized(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return moves(node) or any(any(check(node, modules)) for check in _KEEPING_CHECKS)


def structure_findings(
    plan: Plan, converted: fx.GraphModule, kinds: Kinds | None = None
) -> Iterator[Finding]:
    """Where the converted graph differs from the plan (QR410).

    A weight that is not in ``kinds`` is unpacked.
    """
    realised = realised_sites(converted)
    modules = dict(converted.named_modules(remove_duplicate=False))
    for site in plan.sites:
        expected = site.mode or "float"
        real = realised.get(site.name)
        if real is None:
            yield differs(site, expected, "vanished")
        elif real.became != expected:
            yield differs(site, expected, f"became {real.became} ({_shown(real.node, modules)})")
        else:
            problem = weight_problem(site, modules.get(str(real.node.target)), kinds or {})
            if problem:
                yield differs(site, expected, problem)
    for name in realised.keys() - {site.name for site in plan.sites}:
        yield Finding("QR410", f"{name} was converted, but is not in the plan")


def _shown(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        kind = type(modules[str(node.target)])
        return f"{kind.__module__}.{kind.__qualname__}"
    return str(node.target)
