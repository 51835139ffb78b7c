"""Graphs that replace the parts of a model and run node by node under observation."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from qrecipe.model.call import Inputs, bind

See = Callable[[fx.Node, Any, float], None]
"""Called with each node, its result and the seconds that it took."""


class Watched(nn.Module):
    """Computes what the graph module does, and passes each result to ``see``."""

    def __init__(self, graph_module: fx.GraphModule, see: See) -> None:
        super().__init__()
        self.graph_module = graph_module
        self._see = see

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = bind(self.graph_module, self.graph_module, Inputs(args, kwargs))
        return _Watching(self.graph_module, self._see).run(*inputs)


class _Watching(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule, see: See) -> None:
        super().__init__(graph_module)
        self._see = see

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter()
        result = super().run_node(n)
        self._see(n, result, time.perf_counter() - start)
        return result
