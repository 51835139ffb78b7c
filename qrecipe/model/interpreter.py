"""FX graphs that are run node by node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn


class Interpreter(fx.Interpreter):
    """torch's interpreter, whose errors stay those of the node.

    torch would add the place in the graph, and import its compiler for that: more than a second. It
    would also put the node's ``meta`` on what another thread exports in the meantime.
    """

    def __init__(
        self, module: nn.Module, garbage_collect_values: bool = True, graph: fx.Graph | None = None
    ) -> None:
        super().__init__(module, garbage_collect_values, graph)
        self.extra_traceback: Any = False

    @contextmanager
    def _set_current_node(self, node: fx.Node) -> Iterator[None]:
        yield

    def value(self, node: fx.Node) -> Any:
        """The value of a node; what it needs is run if it was not yet."""
        missing, found = [node], {node}
        while missing:
            read = found.union(missing.pop().all_input_nodes).difference(found, self.env)
            missing += read
            found |= read
        for each in sorted(found.difference(self.env)):
            self.env[each] = self.run_node(each)
        return self.env[node]
