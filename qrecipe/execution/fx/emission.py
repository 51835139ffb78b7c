"""Plan -> FX: one exact rule for every node, so that nothing is left for FX to decide."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn

from qrecipe._torch_fx import QConfigMapping
from qrecipe.model.addresses import CALLS, DROPS, SITE, TRACE_PREFIX
from qrecipe.model.altered_modules import keep_float, make_affine
from qrecipe.model.moving import restore_moves
from qrecipe.model.nodes import module_of
from qrecipe.model.outputs import restore_constants
from qrecipe.observers.qconfig import qconfig
from qrecipe.planning.plan import Limits, Plan, Site


@dataclass(frozen=True, slots=True)
class Emission:
    """The input of FX besides the graph.

    ``qconfig_mapping`` has one exact name for every call: a module's path, or for functions and
    methods the scope that ``scopes`` gives to the node. It only fits this graph. ``clamps`` are the
    limits between which sites are observed.
    """

    qconfig_mapping: QConfigMapping
    scopes: Mapping[str, tuple[str, type]]
    clamps: Mapping[str, Limits]


def emit(plan: Plan, graph_module: fx.GraphModule) -> Emission:
    """Annotate the graph with the plan, in place, and return the rules for it."""
    sites = {site.name: site for site in plan.sites}
    _separate_float_results(graph_module, sites)
    mapping = QConfigMapping().set_global(None)
    scopes: dict[str, tuple[str, type]] = {}
    taken = {name for name, _ in graph_module.named_modules(remove_duplicate=False)}
    channels = _channels(graph_module)
    for node in graph_module.graph.nodes:
        if node.op not in CALLS:
            scopes[node.name] = ("", type(None))  # torch looks up whatever it folds
            continue
        site = sites.get(node.meta.get(SITE, ""))
        scope = _scope(node, taken)
        scopes[node.name] = (scope, type(None))
        key = str(node.target) if node.op == "call_module" else scope
        made = None
        if site is not None and site.qconfig is not None:
            made = qconfig(site.qconfig, plan.phase, channels.get(site.name, 1))
            if node.op == "call_module":
                make_affine(graph_module.get_submodule(str(node.target)))
        mapping.set_module_name(key, made)
        if site is not None:
            # lowering keeps only the stack trace of a binary operation
            node.meta["stack_trace"] = TRACE_PREFIX + site.name
    return Emission(mapping, scopes, plan.clamps)


def _channels(graph_module: fx.GraphModule) -> dict[str, int]:
    """The number of output channels of each site's weight; each channel can learn a scale."""
    weights = {
        str(node.meta[SITE]): weight
        for node in graph_module.graph.nodes
        if SITE in node.meta and (weight := _weight(node)) is not None
    }
    return {name: len(weight) for name, weight in weights.items() if weight.dim()}


def _weight(node: fx.Node) -> Tensor | None:
    module = module_of(node)
    owner = module[0] if isinstance(module, nn.Sequential) else module
    # the weights of a recurrent module have one row per gate output
    found = (getattr(owner, name, None) for name in ("weight", "weight_ih_l0", "weight_ih"))
    return next((weight for weight in found if isinstance(weight, Tensor)), None)


def erase_marks(graph_module: fx.GraphModule) -> None:
    """Undo what was done for FX alone: identities, names of constants, calls in disguise."""
    identities = [node for node in graph_module.graph.nodes if node.target is keep_float]
    for node in identities:
        node.replace_all_uses_with(node.args[0])
        graph_module.graph.erase_node(node)
    restored = [restore_constants(graph_module), restore_moves(graph_module)]
    if any(restored) or identities:
        graph_module.recompile()


def _separate_float_results(graph_module: fx.GraphModule, sites: Mapping[str, Site]) -> None:
    is_changed = False
    for node in list(graph_module.graph.nodes):
        site = sites.get(node.meta.get(SITE, ""))
        if site is None or _is_static(site):
            continue
        consumers = [user for user in node.users if _reaches_static(user, sites)]
        if consumers:
            with graph_module.graph.inserting_after(node):
                identity = graph_module.graph.call_function(keep_float, (node,))
            for consumer in consumers:
                consumer.replace_input_with(node, identity)
            is_changed = True
    if is_changed:
        graph_module.recompile()


def _reaches_static(node: fx.Node, sites: Mapping[str, Site]) -> bool:
    if DROPS in node.meta:
        return any(_reaches_static(user, sites) for user in node.users)
    return _is_static(sites.get(node.meta.get(SITE, "")))


def _is_static(site: Site | None) -> bool:
    return site is not None and site.mode == "static"


def _scope(node: fx.Node, taken: set[str]) -> str:
    """A unique name without dots; it also names the node's scale."""
    stem = re.sub(r"\W", "_", node.meta.get(SITE) or node.name)
    name, number = stem, 0
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    taken.add(name)
    return name
