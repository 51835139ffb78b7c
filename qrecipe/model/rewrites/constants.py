"""What forward computes from stored tensors alone is computed once, and stored.

Weights are often computed: standardised, scaled for equal learning rates, joined from parts, cut
out of one tensor. In eval mode they are constants, and a layer with a stored weight can be int8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe.model.addresses import DROPS, members_of
from qrecipe.model.altered_modules import alteration
from qrecipe.model.changes import is_in_place
from qrecipe.model.interpreter import Interpreter
from qrecipe.model.nodes import graph_module_of, module_of, store, stored
from qrecipe.model.outputs import is_packing
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.process.warnings import held_back
from qrecipe.rules.structure import Member

_LEARNT = "learnt"


def fold_constants(graph_module: fx.GraphModule, is_trained: bool) -> tuple[Member, ...]:
    """Replace calls whose tensors are all stored with their results, in place.

    The calls that are gone are returned. If the graph ``is_trained``, what is computed from
    parameters that learn stays, and is marked.
    """
    sources = _sources(graph_module)
    if is_trained:
        for node, tensors in sources.items():
            if any(stored(tensor).requires_grad for tensor in tensors):
                node.meta[_LEARNT] = True
        sources = {node: each for node, each in sources.items() if _LEARNT not in node.meta}
    folder = _Folder(graph_module, garbage_collect_values=False)
    for node in [node for node in sources if node.op != "get_attr"]:
        readers = [
            user
            for user in node.users
            # the caller may write to what is returned, and a call to what it is given
            if user not in sources
            and user.op != "output"
            and not is_packing(user)
            and not (is_in_place(user) and user.args[0] is node)
        ]
        value = folder.result(node) if readers else None
        if isinstance(value, Tensor):
            made = _stored(value, node, sources[node][0])
            for reader in readers:
                reader.replace_input_with(node, made)
    before = dict.fromkeys(member for node in sources for member in members_of(node))
    graph_module.graph.eliminate_dead_code()
    after = {member for node in graph_module.graph.nodes for member in members_of(node)}
    return tuple(member for member in before if member not in after)


def is_learnt(node: fx.Node) -> bool:
    """Whether a call only computes with stored tensors, of which some learn."""
    return _LEARNT in node.meta


def _sources(graph_module: fx.GraphModule) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """The nodes that only depend on stored tensors, and which ones they read."""
    found: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            if isinstance(stored(node), Tensor):
                found[node] = (node,)
        elif _computes(node):
            read = node.all_input_nodes
            if read and all(source in found for source in read):
                found[node] = tuple(dict.fromkeys(each for one in read for each in found[one]))
    return found


def _computes(node: fx.Node) -> bool:
    """Whether a node calls a function, or a module of torch's that is one, as `nn.Sigmoid` is."""
    module = module_of(node)
    if module is None:
        return node.op in ("call_function", "call_method") and not is_packing(node)
    is_function = type(module).__module__.startswith("torch.nn.") and alteration(module) is None
    return is_function and not module.state_dict() and DROPS not in node.meta


class _Folder(Interpreter):
    """Computes constants, and what they are made of."""

    def result(self, node: fx.Node) -> Any:
        """The value of a constant; None if it cannot be computed, as with zeros for weights."""
        try:
            with torch.no_grad(), held_back([("", Warning)]):
                return self.value(node)
        except Exception as error:
            raise_lack_of_memory(error)
            return None

    def run_node(self, n: fx.Node) -> Any:
        if is_in_place(n):
            changed: Any = n.args[0]
            self.env[changed] = self.env[changed].clone()
        return super().run_node(n)


def _stored(value: Tensor, node: fx.Node, source: fx.Node) -> fx.Node:
    """A new node that reads the value of a node, stored under the name of what it is made of."""
    if value.is_floating_point():
        value = nn.Parameter(value.detach(), requires_grad=False)
    name = store(value, str(source.target).replace(".", "_"), graph_module_of(node))
    with node.graph.inserting_before(node):
        made = node.graph.get_attr(name)
    made.meta = {"value": node.meta["value"]}
    return made
