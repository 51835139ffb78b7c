"""FX graphs that are run node by node."""

from __future__ import annotations

from typing import Any

from torch import fx


class Interpreter(fx.Interpreter):
    """torch's interpreter, whose errors stay those of the node.

    torch would add the place in the graph, and import its compiler for that: more than a second.
    """

    def __init__(self, module: fx.GraphModule, garbage_collect_values: bool = True) -> None:
        super().__init__(module, garbage_collect_values)
        self.extra_traceback: Any = False
