"""A fused graph -> the program of aten operators that torch.export makes of it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from qrecipe.errors.text import first_line
from qrecipe.execution.joined import Interpreted
from qrecipe.execution.pt2e.inputs import GUARDS, Expected, InputChecks
from qrecipe.execution.pt2e.written import read_what_was_written
from qrecipe.model.addresses import SITE
from qrecipe.model.call import Inputs, bind
from qrecipe.model.copies import structural_copy
from qrecipe.model.exported import exported, of_several
from qrecipe.model.unfit import unfit
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.process.state import alone

GIVER = "giver"
"""In a node's ``meta``: the name of the node of the fused graph that it comes from."""

_CUSTOM = "custom"
"""What torch.export keeps of a node's ``meta`` on all operators that the node becomes."""


def captured(graph_module: fx.GraphModule, inputs: Inputs) -> fx.GraphModule:
    """The program, with the graph's own signature and names of tensors, which it shares.

    Each operator has its site in ``meta["site"]``. The first dimension of the inputs is free where
    the model allows that. torch keeps in a global what operators are given, so nothing else may run
    a graph node by node in the meantime. Raises ``PlanError`` (QR306) if torch fails.
    """
    source = structural_copy(graph_module)
    for node in source.graph.nodes:
        site = {SITE: node.meta[SITE]} if SITE in node.meta else {}
        node.meta[_CUSTOM] = {GIVER: node.name, **site}
    args = bind(source, source, of_several(inputs))
    try:
        with alone(), fx.traceback.preserve_node_meta():
            program: Any = exported(Interpreted(source), args, {}).module()
    except Exception as error:
        raise_lack_of_memory(error)
        hint = 'set executor = "fx", or leave the key out'
        raise unfit(f"torch cannot export the model: {first_line(error)}", hint) from error
    return _with_signature(program, source, args)


_PREFIX = "source."


def _with_signature(
    program: fx.GraphModule, source: fx.GraphModule, args: Sequence[Any]
) -> fx.GraphModule:
    """The program called as its source is, with the names that tensors have there."""
    graph = program.graph
    out_spec = graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    graph.set_codegen(CodeGen())
    _check_inputs(program, source, args)
    _take_arguments(graph, source, args)
    (output,) = graph.find_nodes(op="output")
    if not out_spec.is_leaf():
        program.add_submodule("_result", _Result(out_spec))
        with graph.inserting_before(output):
            output.args = (graph.call_module("_result", tuple(output.args[0])),)
    else:
        output.args = tuple(output.args[0])
    for node in graph.nodes:
        if node.op == "call_function":
            node.meta |= node.meta.get(_CUSTOM) or {}
        if node.op == "get_attr":
            _name_as_before(node, program)
    read_what_was_written(graph)
    return fx.GraphModule(program, graph)


def _check_inputs(program: fx.GraphModule, source: fx.GraphModule, args: Sequence[Any]) -> None:
    """Let the program check its flat inputs, in place."""
    names = [str(node.target) for node in source.graph.find_nodes(op="placeholder")]
    expected = [
        Expected(name, leaf.dtype, leaf.dim()) if isinstance(leaf, Tensor) else None
        for name, value in zip(names, args, strict=True)
        for leaf in pytree.tree_leaves(value)
    ]
    guards = getattr(program, GUARDS, None)
    program.add_submodule(GUARDS, InputChecks(guards, names, expected))
    if guards is None:
        flat = program.graph.find_nodes(op="placeholder")
        with program.graph.inserting_after(flat[-1]):
            program.graph.call_module(GUARDS, tuple(flat))


def _take_arguments(graph: fx.Graph, source: fx.GraphModule, args: Sequence[Any]) -> None:
    """Replace the flat inputs of an exported graph with the placeholders of its source."""
    flat = iter(graph.find_nodes(op="placeholder"))
    first = next(node for node in graph.nodes if node.op != "placeholder")  # those are erased
    for placeholder, value in zip(source.graph.find_nodes(op="placeholder"), args, strict=True):
        with graph.inserting_before(first):
            given = graph.placeholder(str(placeholder.target), default_value=_default(placeholder))
        for leaf, node in zip(_leaves(graph, first, given, value), flat, strict=False):
            leaf.meta = dict(node.meta)
            node.replace_all_uses_with(leaf)
            graph.erase_node(node)


def _default(placeholder: fx.Node) -> Any:
    return placeholder.args[0] if placeholder.args else inspect.Parameter.empty


def _leaves(graph: fx.Graph, first: fx.Node, given: fx.Node, value: Any) -> Iterator[fx.Node]:
    if pytree.tree_structure(value).is_leaf():
        yield given
        return
    with graph.inserting_before(first):
        leaves = graph.call_function(pytree.tree_leaves, (given,))
        for index in range(len(pytree.tree_leaves(value))):
            yield graph.call_function(operator.getitem, (leaves, index))


class _Result(nn.Module):
    """Puts the results of a program into the containers that the model returns."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.spec = spec

    def __deepcopy__(self, memo: dict[int, Any]) -> _Result:
        return _Result(self.spec)  # torch copies specs by way of what it has deprecated

    def forward(self, *leaves: Any) -> Any:
        return pytree.tree_unflatten(leaves, self.spec)


def _name_as_before(node: fx.Node, program: fx.GraphModule) -> None:
    name = str(node.target)
    if not name.startswith(_PREFIX):
        return
    owner, _, own = name.removeprefix(_PREFIX).rpartition(".")
    node.target = name.removeprefix(_PREFIX)
    if owner:
        program.add_submodule(owner, program.get_submodule(f"{_PREFIX}{owner}"))
    else:
        setattr(program, own, getattr(program.get_submodule("source"), own))
