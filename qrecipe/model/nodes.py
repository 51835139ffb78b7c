"""What the nodes of a graph call and read, and what is stored with a graph."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from typing import Any

from torch import Tensor, fx, nn

from qrecipe.rules.structure import joined


def module_of(node: fx.Node) -> Any:
    """The module that a node calls; None for a function, a method or anything else."""
    owner = node.graph.owning_module
    if node.op != "call_module" or owner is None:
        return None
    return owner.get_submodule(str(node.target))


def called_modules(graph: fx.Graph) -> list[tuple[fx.Node, Any]]:
    """The nodes that call modules, in order, and what they call."""
    return [(node, module_of(node)) for node in graph.nodes if node.op == "call_module"]


def stored(source: object, graph_module: nn.Module) -> Any:
    """What a ``get_attr`` node reads: a parameter, a buffer or another attribute.

    None for all other nodes, and for arguments that are not nodes.
    """
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    owner, name = stored_in(source, graph_module)
    return getattr(owner, name)


def stored_value(argument: Any, graph_module: nn.Module) -> Any:
    """The tensor that an argument of a call reads, or the argument itself."""
    return stored(argument, graph_module) if isinstance(argument, fx.Node) else argument


def stored_in(node: fx.Node, graph_module: nn.Module) -> tuple[nn.Module, str]:
    """The module whose attribute a ``get_attr`` node reads, and the name of the attribute."""
    path, _, name = str(node.target).rpartition(".")
    return graph_module.get_submodule(path), name


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


def erase_unread(nodes: Iterable[fx.Node]) -> None:
    """Erase those of the nodes that nothing reads any more."""
    for node in nodes:
        if not node.users:
            node.graph.erase_node(node)
