"""Reading the shape of a result must not keep it from being fused."""

from __future__ import annotations

import torch.nn.functional as F
from torch import fx, nn

_KEEPS_SHAPE = (nn.modules.batchnorm._BatchNorm, nn.ReLU)


def let_shapes_be_read_later(graph_module: fx.GraphModule) -> None:
    """Read shapes behind BatchNorm and ReLU instead of before them, in place.

    torch only fuses what has a single reader, and a size or a check of the rank is one.
    """
    for node in list(graph_module.graph.nodes):
        readers = [user for user in node.users if _reads_shape(user)]
        others = [user for user in node.users if user not in readers]
        if not readers or len(others) != 1 or not _keeps_shape(others[0], graph_module):
            continue
        node.append(others[0])
        for reader in readers:
            reader.replace_input_with(node, others[0])


def _reads_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return node.target is getattr and node.args[1] in ("shape", "ndim")


def _keeps_shape(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return isinstance(graph_module.get_submodule(str(node.target)), _KEEPS_SHAPE)
    return node.target is F.relu
