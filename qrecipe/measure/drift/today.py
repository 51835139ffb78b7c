"""Today's data for the stored ranges of a graph: their statistics, and what the observers find."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe.audit.float_kernels import float_result, is_kernel
from qrecipe.errors.text import first_line
from qrecipe.measure.drift.distribution import Distribution
from qrecipe.measure.drift.report import SiteDrift
from qrecipe.measure.drift.stored_ranges import QRange, StoredRange, sharing, stored_ranges
from qrecipe.model.addresses import is_conversion, site_of
from qrecipe.model.call import Inputs, bind
from qrecipe.model.interpreter import Interpreter
from qrecipe.model.nested import map_tensors
from qrecipe.observers.loading import load
from qrecipe.observers.merging import Subject
from qrecipe.observers.qconfig import factory
from qrecipe.planning.plan import Plan
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.recipe.schema import Constructor, TensorSpec, quantized_range


class Tally:
    """Sums over batches for one tensor."""

    def __init__(self, stored: StoredRange) -> None:
        self.stored = stored
        self._values = Distribution()
        self._count = 0
        self._clipped = 0
        self._outside = 0
        self._is_bound = False

    def add(self, value: Any, kept: Tensor) -> None:
        """Count the float values of a batch, as far as they are read.

        Where they are not known, the kernel's own results, which it has ``kept``, are counted.
        """
        if not isinstance(value, Tensor):
            self._add_rounded(kept.dequantize())
            return
        value = self.stored.read(value)
        self._count_values(value)
        self._clipped += int(self.stored.possible.outside(value).sum())
        self._outside += int(self.stored.calibrated.outside(value).sum())

    def _add_rounded(self, kept: Tensor) -> None:
        self._is_bound = True
        self._count_values(kept)
        clipped = self.stored.possible.at_ends(kept)
        self._clipped += int(clipped.sum())
        self._outside += int((clipped | self.stored.calibrated.outside(kept)).sum())

    def _count_values(self, values: Tensor) -> None:
        self._values.add(values)
        self._count += values.numel()

    def merge(self, other: Tally) -> None:
        """Add the sums of the same tensor on another rank."""
        self._values.merge(other._values)
        self._count += other._count
        self._clipped += other._clipped
        self._outside += other._outside
        self._is_bound |= other._is_bound

    def result(self, now: QRange | None, position: int) -> SiteDrift:
        """The result; ``now`` is the range of today's data, ``position`` that of the tensor."""
        site, stored = self.stored.site, self.stored.calibrated
        after = None if now is None else self.stored.with_all_integers(now)
        count = max(1, self._count)
        return SiteDrift(
            name=site.name,
            op=site.op,
            tensor=self.stored.role if position == 1 else f"{self.stored.role} {position}",
            dtype=str(self.stored.spec.dtype),
            stored=stored,
            now=now,
            values=self._values.histogram(),
            is_finite=self._values.is_finite,
            clipped=self._clipped / count,
            clipped_after=0.0 if after is None else self._values.share(after.outside),
            outside=self._outside / count,
            is_bound=self._is_bound,
            sqnr_db=self._sqnr_db(self.stored.possible),
            sqnr_after_db=self._sqnr_db(after),
        )

    def _sqnr_db(self, kernel: QRange | None) -> float | None:
        if kernel is None or self._is_bound:
            return None
        return self._values.sqnr_db(kernel.rounded)


class Observing:
    """Makes observers; ``missing`` has the names of unavailable ones, and why."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}

    def observer(self, spec: TensorSpec) -> Watch:
        """The observer of a spec, or one of minimum and maximum if it is not available."""
        try:
            if spec.observer is not None:
                load("observer", spec.observer.name)
            return Watch(factory(spec, "ptq")(), spec)
        except Exception as error:
            raise_lack_of_memory(error)
            name = "placeholder" if spec.observer is None else spec.observer.name
            self.missing[name] = first_line(error)
        plain = spec.model_copy(update={"observer": Constructor(name="minmax")})
        return Watch(factory(plain, "ptq")(), spec)


class Watch:
    """One observer and what it has found.

    A moving average weighs all batches equally: the value that it would converge to.
    """

    def __init__(self, observer: Any, spec: TensorSpec) -> None:
        self._observer = observer
        self._spec = spec
        self._seen = 0
        self._failed = False

    def subject(self) -> Subject:
        """The observer, to be merged with those of other ranks."""
        return Subject(type(self._observer).__name__, self._observer, self._observer, self.see)

    def restart(self, calls: int = 0) -> None:
        """Continue counting from this number of calls."""
        self._seen = calls

    def see(self, value: Tensor) -> None:
        """Observe the values of one batch; empty batches are ignored."""
        if not value.numel():
            return
        self._seen += 1
        if hasattr(self._observer, "averaging_constant"):
            self._observer.averaging_constant = 1 / self._seen
        try:
            self._observer(value.detach().float())
        except Exception as error:
            raise_lack_of_memory(error)
            self._failed = True

    def range(self) -> QRange | None:
        """The range that it gives now; None if that is not valid."""
        limits = quantized_range(self._spec)
        if self._failed or not self._seen or limits is None:
            return None
        try:
            scale, zero_point = self._observer.calculate_qparams()
            step, zero = float(scale), int(zero_point)
        except Exception as error:
            raise_lack_of_memory(error)
            return None
        if not (math.isfinite(step) and step > 0 and torch.isfinite(scale).all()):
            return None
        return QRange.of(step, zero, limits)


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
        self._floating[n] = map_tensors(_dequantized, result) if value is None else value
        if n in self._shadow.tallies and self._shadow.is_tallying:
            self._shadow.tallies[n].add(value, result)
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
            module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
            if is_kernel(n, module):
                return float_result(n, module, args, kwargs)
            return getattr(self, n.op)(n.target, args, kwargs)
        except Exception as error:  # an unknown kernel: the report says so
            raise_lack_of_memory(error)
            return None


def _dequantized(x: Tensor) -> Tensor:
    return x.dequantize() if x.is_quantized else x
