"""The structural audit: what each site became, without data.

In a lowered graph, the class or kernel tells. In a reference conversion, an operation is quantized
if its inputs come from ``dequantize``, its result goes to ``quantize_per_tensor``, and its weight
has a grid. An operation without a weight between two quantized ones looks the same, planned or not:
a backend may quantize it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qrecipe._torch_fx import (
    ReferenceQuantizedModule,
    is_copy_node,
    is_fixed_qparams_node,
    is_general_tensor_shape_node,
    is_other_node,
)
from qrecipe.audit.modules import differs, weight_problem
from qrecipe.errors.findings import Finding
from qrecipe.execution.packing import Kinds
from qrecipe.execution.part import Realised
from qrecipe.model.addresses import (
    CALLS,
    carries_data,
    is_conversion,
    is_floating,
    is_plumbing,
    site_of,
)
from qrecipe.model.moving import PIECE, moves
from qrecipe.model.nodes import module_of
from qrecipe.model.quantized import Became, module_became
from qrecipe.observers.qconfig import torch_dtype
from qrecipe.planning.plan import Plan, Site
from qrecipe.recipe.schema import TensorSpec

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
    module = module_of(node)
    became = _function_became(node.target) if module is None else module_became(module)
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
    for site in plan.sites:
        expected = site.mode or "float"
        real = realised.get(site.name)
        if real is None:
            yield differs(site, expected, "vanished")
        elif real.became != expected:
            yield differs(site, expected, f"became {real.became} ({_shown(real.node)})")
        else:
            problem = weight_problem(site, module_of(real.node), kinds or {})
            if problem:
                yield differs(site, expected, problem)
    for name in realised.keys() - {site.name for site in plan.sites}:
        yield Finding("QR410", f"{name} was converted, but is not in the plan")


def _shown(node: fx.Node) -> str:
    kind = type(module_of(node))
    return str(node.target) if kind is NoneType else f"{kind.__module__}.{kind.__qualname__}"


_WEIGHTED_MODULES = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
)


@dataclass(frozen=True, slots=True)
class _Weight:
    """The grid of a weight; None if torch keeps several or does not say."""

    dtype: torch.dtype | None
    per_channel: bool | None


def reference_findings(plan: Plan, reference: fx.GraphModule) -> Iterator[Finding]:
    """Where a reference conversion differs from the plan (QR410)."""
    nodes: dict[str, list[fx.Node]] = {}
    for node in reference.graph.nodes:
        if node.op not in CALLS or is_conversion(node):
            continue
        name = site_of(node)
        if name is None and _weight(node) is not None:
            name = str(node.target)
        if name is not None:
            nodes.setdefault(name, []).append(node)
    for site in plan.sites:
        own = nodes.pop(site.name, None)
        problem = "vanished" if own is None else _problem(site, own)
        if problem is not None:
            yield differs(site, site.mode or "float", problem)
    for name in nodes:
        yield Finding("QR410", f"{name} was converted, but is not in the plan")


def _problem(site: Site, nodes: list[fx.Node]) -> str | None:
    weight = next(filter(None, (_weight(node) for node in nodes)), None)
    if site.mode is None:
        return None if weight is None else f"has weights of {weight.dtype}"
    if weight is None and any(isinstance(_inner(node), _WEIGHTED_MODULES) for node in nodes):
        return "has float weights"
    spec = site.qconfig.weight if site.qconfig else None
    if weight is not None and spec is not None:
        problem = _weight_problem(weight, spec)
        if problem is not None:
            return problem
    if site.mode == "static":
        return _static_problem(site, nodes)
    is_half = weight is not None and weight.dtype == torch.float16
    if site.mode == "dynamic" and not is_half and not _is_fed_dynamically(nodes):
        return "takes its input as it is"
    return None


def _weight(node: fx.Node) -> _Weight | None:
    """The quantized weight of a node, if it has one."""
    module = _inner(node)
    if not isinstance(module, ReferenceQuantizedModule):
        return None
    scheme = getattr(module, "weight_qscheme", None)
    per_channel = None if scheme is None else str(scheme).startswith("torch.per_channel")
    return _Weight(getattr(module, "weight_dtype", None), per_channel)


def _inner(node: fx.Node) -> Any:
    """The module that a node calls, the first one of a fused module; None for a function."""
    module = module_of(node)
    return module[0] if isinstance(module, nn.Sequential) and len(module) else module


def _weight_problem(weight: _Weight, spec: TensorSpec) -> str | None:
    if weight.dtype is not None and weight.dtype != torch_dtype(spec):
        return f"has weights of dtype {weight.dtype}"
    wants_per_channel = (spec.qscheme or "per_tensor").startswith("per_channel")
    is_integer = weight.dtype is not None and not weight.dtype.is_floating_point
    if is_integer and weight.per_channel not in (None, wants_per_channel):
        return f"has weights quantized per {'channel' if weight.per_channel else 'tensor'}"
    return None


def _static_problem(site: Site, nodes: list[fx.Node]) -> str | None:
    if not all(source.target == "dequantize" for source in _data_inputs(nodes)):
        return "takes a float input"
    quantizes = [user for user in _readers(nodes[-1]) if user.target is torch.quantize_per_tensor]
    if not quantizes:
        return "gives a float result"
    spec = site.qconfig.activation if site.qconfig and site.verdict == "quantized" else None
    if spec is not None and torch_dtype(spec) not in {user.args[-1] for user in quantizes}:
        return f"gives results of dtype {quantizes[0].args[-1]}"
    return None


def _is_fed_dynamically(nodes: list[fx.Node]) -> bool:
    return all(
        source.target == "dequantize"
        and source.all_input_nodes[0].target is torch.quantize_per_tensor_dynamic
        for source in _data_inputs(nodes)
    )


def _data_inputs(nodes: list[fx.Node]) -> Iterator[fx.Node]:
    """What a site reads from other operations or the model's inputs, with tuples unpacked."""
    for node in nodes:
        for source in node.all_input_nodes:
            # nodes that conversion made carry no value and are always tensors
            is_data = "value" not in source.meta or is_floating(source)
            if source not in nodes and source.op != "get_attr" and is_data:
                yield _whole(source)


def _whole(node: fx.Node) -> fx.Node:
    """What a node is a part of, or pads explicitly for a reference module."""
    while is_plumbing(node) if "value" in node.meta else node.target is F.pad:
        node = node.all_input_nodes[0]
    return node


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        yield from _readers(user) if "value" in user.meta and is_plumbing(user) else (user,)
