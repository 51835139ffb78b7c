"""Models under observation: each result of a graph, or of modules, and the time that it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx, nn

from qrecipe.model.call import Inputs, bind
from qrecipe.model.copies import structural_copy
from qrecipe.model.dry_run import around_calls
from qrecipe.model.interpreter import Interpreter
from qrecipe.process.threads import clock

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


class _Watching(Interpreter):
    def __init__(self, graph_module: fx.GraphModule, see: See) -> None:
        super().__init__(graph_module)
        self._see, self._now = see, clock()

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        run = getattr(self, n.op)
        start = self._now()
        result = run(n.target, args, kwargs)
        self._see(n, result, self._now() - start)
        return result


SeeModule = Callable[[str, Any, float], None]
"""Called with the path of a module, its result and the seconds that it took."""


def watched_modules(model: nn.Module, paths: Iterable[str], see: SeeModule) -> nn.Module:
    """A copy of a model whose modules at ``paths`` pass their results to ``see``."""
    watched, now = structural_copy(model).eval(), clock()

    def timed(path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = now()
        result = forward(*args, **kwargs)
        see(path, result, now() - start)
        return result

    around_calls(watched, paths, timed)
    return watched
