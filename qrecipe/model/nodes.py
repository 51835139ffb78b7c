"""What the nodes of a graph call and read, and what is stored with a graph."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn

from qrecipe.rules.structure import joined


def module_of(node: fx.Node) -> Any:
    """The module that a node calls; None for a function, a method or anything else."""
    owner = node.graph.owning_module
    if node.op != "call_module" or owner is None:
        return None
    return owner.get_submodule(str(node.target))


def graph_module_of(node: fx.Node) -> fx.GraphModule:
    """The graph module that a node is in."""
    owner = node.graph.owning_module
    assert owner is not None, "its graph is being traced"
    return owner


def called_modules(graph: fx.Graph) -> list[tuple[fx.Node, Any]]:
    """The nodes that call modules, in order, and what they call."""
    return [(node, module_of(node)) for node in graph.nodes if node.op == "call_module"]


def stored(source: object) -> Any:
    """What a ``get_attr`` node reads: a parameter, a buffer or another attribute.

    None for all other nodes, and for arguments that are not nodes.
    """
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    return attrgetter(str(source.target))(graph_module_of(source))


def stored_value(argument: Any) -> Any:
    """The tensor that an argument of a call reads, or the argument itself."""
    return stored(argument) if isinstance(argument, fx.Node) else argument


def free_name(graph_module: fx.GraphModule, path: str) -> str:
    """A name after ``path`` that no module, parameter or buffer of the graph has yet."""
    outer, _, name = path.rpartition(".")
    owner = graph_module.get_submodule(outer)
    taken = {*owner._modules, *owner._parameters, *owner._buffers}
    free = next(free for k in count(1) if (free := f"{name}__call{k}") not in taken)
    return joined(outer, free)


def store(tensor: Tensor, path: str, graph_module: fx.GraphModule) -> str:
    """Store a tensor with a graph, as a parameter if it is one; returns its name after ``path``."""
    free = free_name(graph_module, path)
    owner, _, name = free.rpartition(".")
    module = graph_module.get_submodule(owner)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor)
    return free


def call_instead(node: fx.Node, module: nn.Module, source: Any, path: str = "") -> None:
    """Let a node call a module with one argument, in place; its path is ``path`` or after that."""
    graph_module, inputs = graph_module_of(node), node.all_input_nodes
    node.op, node.target = "call_module", free_name(graph_module, path or node.name)
    node.args, node.kwargs = (source,), {}
    graph_module.add_submodule(node.target, module)
    erase_unread(inputs)


def erase_unread(nodes: Iterable[fx.Node]) -> None:
    """Erase those of the nodes that nothing reads any more."""
    for node in nodes:
        if not node.users:
            node.graph.erase_node(node)


def readers_of_values(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a result, and not only its shape."""
    return [user for user in node.users if not reads_shape(user)]


def reads_shape(node: fx.Node) -> bool:
    """Whether a node reads the sizes of its input and no value of it."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "ndimension", "numel")
    return node.target is getattr and node.args[1] in ("shape", "ndim")
