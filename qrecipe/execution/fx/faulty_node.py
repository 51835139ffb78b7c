"""The node at which a graph fails on some inputs, or no longer follows their batch size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qrecipe._torch_ao import quiet
from qrecipe.model.call import Inputs, bind
from qrecipe.model.interpreter import Interpreter


class _Watched(Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.sizes: dict[fx.Node, int | None] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.sizes[n] = None
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.dim():
            self.sizes[n] = result.shape[0]
        return result


def faulty_node(graph_module: fx.GraphModule, usual: Inputs, other: Inputs) -> fx.Node | None:
    """The first node that fails, or whose results keep the batch size of the ``usual`` inputs."""
    before, _ = _sizes(graph_module, usual)
    after, has_failed = _sizes(graph_module, other)
    size = usual.batch_size
    for node, now in after.items():
        if node.op.startswith("call") and now == before.get(node) == size != other.batch_size:
            return node
    return list(after)[-1] if has_failed else None


def _sizes(graph_module: fx.GraphModule, inputs: Inputs) -> tuple[dict[fx.Node, int | None], bool]:
    """The first size of each result as far as the graph runs, and whether it failed."""
    watched = _Watched(graph_module)
    try:
        with torch.no_grad(), quiet():
            watched.run(*bind(graph_module, graph_module, inputs.cloned()))
    except Exception:
        return watched.sizes, True
    return watched.sizes, False
