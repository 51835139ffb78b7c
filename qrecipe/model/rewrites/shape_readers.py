"""Reading the shape of a result must not keep it from being fused."""

from __future__ import annotations

import torch.nn.functional as F
from torch import fx, nn

from qrecipe.model.nodes import module_of

_KEEPS_SHAPE = (nn.modules.batchnorm._BatchNorm, nn.ReLU)


def let_shapes_be_read_later(graph_module: fx.GraphModule) -> None:
    """Read shapes after BatchNorm and ReLU instead of before them, in place.

    torch only fuses what has a single reader, and a size or a check of the rank is one.
    """
    for node in list(graph_module.graph.nodes):
        readers = readers_of_values(node)
        if len(readers) == len(node.users) or len(readers) != 1:
            continue
        (reader,) = readers
        if reader.target is F.relu or isinstance(module_of(reader), _KEEPS_SHAPE):
            node.append(reader)
            node.replace_all_uses_with(reader, lambda user, reader=reader: user is not reader)


def readers_of_values(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a result, and not only its shape."""
    return [user for user in node.users if not reads_shape(user)]


def reads_shape(node: fx.Node) -> bool:
    """Whether a node reads the sizes of its input and no value of it."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "ndimension", "numel")
    return node.target is getattr and node.args[1] in ("shape", "ndim")
