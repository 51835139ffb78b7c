"""Whether the ranges that a converted model has stored still fit the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe.audit.float_kernels import float_result, is_kernel
from qrecipe.errors.findings import CalibrationError, ExecutionError, Finding
from qrecipe.errors.text import counted
from qrecipe.errors.warn import warn
from qrecipe.execution.batches import Forward, check_finite, limited, no_batches
from qrecipe.execution.engine import engine
from qrecipe.execution.provenance import converted_graphs, provenance
from qrecipe.measure.batches import run_quietly
from qrecipe.measure.drift.counts import Tally
from qrecipe.measure.drift.observers import Observing
from qrecipe.measure.drift.report import Drift, SiteDrift, worst_first
from qrecipe.measure.drift.stored_ranges import sharing, stored_ranges
from qrecipe.model.call import Inputs, bind
from qrecipe.model.copies import with_parts
from qrecipe.model.nested import map_tensors
from qrecipe.planning.stored import StoredPlan, ingredients_of
from qrecipe.process.neutral import neutral
from qrecipe.recipe.extends import compose
from qrecipe.recipe.references import Source
from qrecipe.recipe.schema import LintTable, RecipeTable
from qrecipe.terminal.progress import Progress, terminal_progress

_MOST_BATCHES = 2**31


@neutral
def drift(
    converted: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> Drift:
    """Hold today's data against the ranges that the model has stored, tensor by tensor.

    Each batch runs through the converted model, and beside it through the same graph in float,
    with the weights that the kernels really have. What that second run gives is shown to the
    observers of the recipe, as in calibration: the ranges that they find are those of today, where
    a moving average gives every batch the same weight. The same values give what the stored range
    clips, and the SQNR that it and the range of today would leave.

    ``converted`` comes from `qrecipe.quantize` or `qrecipe.load_quantized`; ``batches`` and
    ``forward`` are as in `qrecipe.calibrate`. Memory does not grow with the batches.

    Raises:
        ArtifactError: ``converted`` was not converted by qrecipe (QR501).
        CalibrationError: no batches, none with values, or one that the model cannot take.
        ExecutionError: the model has no stored ranges (QR430): it is dynamic or float.
    """
    plan = StoredPlan.model_validate_json(provenance(converted).plan)
    observing = Observing()
    shadows = {
        path: _Shadowed(part, plan, observing) for path, part in converted_graphs(converted).items()
    }
    if not any(shadow.tallies for shadow in shadows.values()):
        raise _nothing_stored()
    _warn_about(observing, converted)
    model = with_parts(converted, shadows)
    show = progress or terminal_progress("looking for drift")
    kernels: AbstractContextManager[None] = (
        nullcontext() if plan.is_for_export else engine(plan.backend)
    )
    count = 0
    with kernels:
        for batch in limited(batches, _MOST_BATCHES):
            check_finite(batch, count)
            run_quietly(model, batch, count, forward)
            count += 1
            show(count, None)
    if not count:
        raise no_batches()
    sites = [site for shadow in shadows.values() for site in shadow.results()]
    if all(site.is_unseen for site in sites):
        raise _no_values(count)
    return Drift(tuple(sorted(sites, key=worst_first)), count, ingredients_of(plan))


def _nothing_stored() -> ExecutionError:
    return ExecutionError(
        Finding(
            "QR430",
            "this model has no stored ranges of activations that could drift",
            hint="dynamic kernels find the range of each input anew; only static rules store any",
        )
    )


def _no_values(batches: int) -> CalibrationError:
    return CalibrationError(
        Finding(
            "QR401",
            f"no value reached a stored range in {counted(batches, 'batch')}",
            hint="are the batches empty, or does forward not call the model?",
        )
    )


def _warn_about(observing: Observing, converted: nn.Module) -> None:
    if not observing.missing:
        return
    names = ", ".join(f'"{name}"' for name in sorted(observing.missing))
    finding = Finding(
        "QR213",
        f"observer {names} cannot be made here: plain minimum and maximum stand in for it",
        hint="install the plugin, or import what registers it, for the ranges that it would give",
        notes=tuple(sorted(set(observing.missing.values()))),
    )
    warn(finding, _lint(converted).ignore)


def _lint(converted: nn.Module) -> LintTable:
    """What the stored recipe ignores; the plugins that it names may be missing here."""
    stored = compose(Source("<recipe>"), provenance(converted).recipe)
    return RecipeTable.model_validate(stored.values).lint


class _Shadowed(nn.Module):
    """A converted graph that runs as it is, and beside it in float, with tallies of its ranges."""

    def __init__(self, part: fx.GraphModule, plan: StoredPlan, observing: Observing) -> None:
        super().__init__()
        self.part = part
        sites = {site.name: site for site in plan.sites}
        self._ranges = stored_ranges(part, sites)
        self.tallies = {node: Tally(stored) for node, stored in self._ranges.items()}
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
        """Show what a node gives in float to the observer that saw it in calibration."""
        if node in self._groups and isinstance(value, Tensor):
            self._observers[self._groups[node]].see(value)

    def results(self) -> Iterator[SiteDrift]:
        count: dict[tuple[str, str], int] = {}
        for node, tally in self.tallies.items():
            key = tally.stored.site.name, tally.stored.role
            count[key] = count.get(key, 0) + 1
            now = self._observers[self._groups[node]].range()
            yield tally.result(now, count[key])


class _Run(fx.Interpreter):
    """One batch: every node twice, on what the model gives and on what float would give."""

    def __init__(self, part: fx.GraphModule, shadow: _Shadowed) -> None:
        super().__init__(part)
        self._shadow = shadow
        self._floating: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        value = self._in_float(n, result)
        self._floating[n] = _dequantized(result) if value is None else value
        if n in self._shadow.tallies:
            _count(self._shadow.tallies[n], result, value)
        self._shadow.observe(n, self._floating[n])
        for dead in self.user_to_last_uses.get(n, []):
            self._floating.pop(dead, None)
        return result

    def _in_float(self, n: fx.Node, result: Any) -> Any:
        """What a node gives for the float values of its inputs; None where that is not known."""
        sources = n.all_input_nodes
        is_exact = all(self._floating[source] is self.env[source] for source in sources)
        if n.op == "output" or (is_exact and not _is_quantizing(n)):
            return result  # of which nothing has been rounded yet
        if _is_quantizing(n) or n.target == "dequantize":
            # a copy: what runs in place must not change it for those who read the other
            return self._floating[sources[0]].clone()
        args, kwargs = fx.map_arg((n.args, n.kwargs), self._floating.__getitem__)
        try:
            module = self._module(n)
            if is_kernel(n, module):
                return float_result(n, module, args, kwargs)
            return getattr(self, n.op)(n.target, args, kwargs)
        except Exception:  # of a kernel that nothing here knows: said in the report
            return None

    def _module(self, n: fx.Node) -> nn.Module | None:
        return self.fetch_attr(str(n.target)) if n.op == "call_module" else None


def _count(tally: Tally, result: Tensor, value: Any) -> None:
    if isinstance(value, Tensor):
        tally.add(value)
    else:
        tally.add_rounded(result.dequantize())


def _is_quantizing(node: fx.Node) -> bool:
    return node.target is torch.quantize_per_tensor


def _dequantized(value: Any) -> Any:
    """A value with a float tensor in place of each quantized one."""
    return map_tensors(lambda each: each.dequantize() if each.is_quantized else each, value)
