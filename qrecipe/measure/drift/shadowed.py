"""A converted graph that runs in float beside itself, with what its ranges saw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn

from qrecipe.audit.float_kernels import float_result, is_kernel
from qrecipe.measure.drift.report import SiteDrift
from qrecipe.measure.drift.stored_ranges import sharing, stored_ranges
from qrecipe.measure.drift.today import Observing, Tally, Watch
from qrecipe.model.addresses import is_conversion, site_of
from qrecipe.model.call import Inputs, bind
from qrecipe.model.interpreter import Interpreter
from qrecipe.model.nested import map_tensors
from qrecipe.planning.plan import Plan
from qrecipe.process.memory import raise_lack_of_memory


class Shadowed(nn.Module):
    """A converted graph that runs as it is and also in float, with tallies of its ranges."""

    def __init__(self, part: fx.GraphModule, plan: Plan, observing: Observing) -> None:
        super().__init__()
        self.part = part
        self.is_tallying = True
        sites = {site.name: site for site in plan.sites}
        self._ranges = stored_ranges(part, sites)
        self.tallies = {node: Tally(stored) for node, stored in self._ranges.items()}
        self._clamps = plan.clamps
        self._groups = sharing(part, self._ranges, sites)
        self._observers = {
            node: observing.observer(stored.spec)
            for node, stored in self._ranges.items()
            if self._groups[node] is node
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = bind(self.part, self.part, Inputs(args, kwargs))
        return _Run(self.part, self).run(*inputs)

    def observe(self, node: fx.Node, value: Any) -> None:
        """Pass the float output of a node to the observer that saw it in calibration."""
        if node in self._groups and isinstance(value, Tensor):
            self._observers[self._groups[node]].see(self._read(node, value))

    def _read(self, node: fx.Node, value: Tensor) -> Tensor:
        """What is read of the output of a node; only operations that copy have no range."""
        if node in self._ranges:
            return self._ranges[node].read(value)
        limits = self._clamps.get(site_of(node) or "")
        return value if limits is None else value.clamp(*limits)

    @property
    def observers(self) -> list[Watch]:
        """The observers of all ranges, in the order of the graph."""
        return list(self._observers.values())

    def results(self) -> Iterator[SiteDrift]:
        count: dict[tuple[str, str], int] = {}
        for node, tally in self.tallies.items():
            key = tally.stored.site.name, tally.stored.role
            count[key] = count.get(key, 0) + 1
            now = self._observers[self._groups[node]].range()
            yield tally.result(now, count[key])


class _Run(Interpreter):
    """Runs every node twice for one batch: on the model's values and on float values."""

    def __init__(self, part: fx.GraphModule, shadow: Shadowed) -> None:
        super().__init__(part)
        self._shadow = shadow
        self._floating: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        value = self._in_float(n, result)
        self._floating[n] = _dequantized(result) if value is None else value
        if n in self._shadow.tallies and self._shadow.is_tallying:
            _count(self._shadow.tallies[n], result, value)
        self._shadow.observe(n, self._floating[n])
        for dead in self.user_to_last_uses.get(n, []):
            self._floating.pop(dead, None)
        return result

    def _in_float(self, n: fx.Node, result: Any) -> Any:
        """The output of a node for float inputs; None if that is not known."""
        sources = n.all_input_nodes
        is_exact = all(self._floating[source] is self.env[source] for source in sources)
        if is_conversion(n):
            # a copy: what runs in place must not change it for those who read the other
            return self._floating[sources[0]].clone()
        if n.op == "output" or is_exact:
            return result  # of which nothing has been rounded yet
        args, kwargs = fx.map_arg((n.args, n.kwargs), self._floating.__getitem__)
        try:
            module = self._module(n)
            if is_kernel(n, module):
                return float_result(n, module, args, kwargs)
            return getattr(self, n.op)(n.target, args, kwargs)
        except Exception as error:  # an unknown kernel: the report says so
            raise_lack_of_memory(error)
            return None

    def _module(self, n: fx.Node) -> nn.Module | None:
        return self.fetch_attr(str(n.target)) if n.op == "call_module" else None


def _count(tally: Tally, result: Tensor, value: Any) -> None:
    if isinstance(value, Tensor):
        tally.add(value)
    else:
        tally.add_rounded(result.dequantize())


def _dequantized(value: Any) -> Any:
    """A value with its quantized tensors dequantized."""
    return map_tensors(lambda each: each.dequantize() if each.is_quantized else each, value)
