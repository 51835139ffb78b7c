"""Check whether the ranges that a converted model has stored still fit the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, fx, nn

from qrecipe.audit.float_kernels import float_result, is_kernel
from qrecipe.errors.findings import CalibrationError, ExecutionError, Finding
from qrecipe.errors.text import counted
from qrecipe.errors.warn import warn
from qrecipe.execution.batches import Forward, check_finite, limited, no_batches
from qrecipe.execution.calls import run_quietly
from qrecipe.execution.engine import engine_of
from qrecipe.execution.provenance import converted_graphs, provenance
from qrecipe.measure.drift.report import Drift, SiteDrift, worst_first
from qrecipe.measure.drift.stored_ranges import sharing, stored_ranges
from qrecipe.measure.drift.today import Observing, Tally
from qrecipe.model.addresses import is_conversion, site_of
from qrecipe.model.call import Inputs, bind
from qrecipe.model.copies import with_parts
from qrecipe.model.interpreter import Interpreter
from qrecipe.model.nested import map_tensors
from qrecipe.planning.plan import Plan
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.process.neutral import neutral
from qrecipe.recipe.extends import compose
from qrecipe.recipe.references import Source
from qrecipe.recipe.schema import LintTable, RecipeTable
from qrecipe.runtimes.table import known_session
from qrecipe.terminal.progress import Progress, chosen_progress


@neutral
def drift(
    converted: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    progress: Progress | bool | None = None,
) -> Drift:
    """Compare new data with the ranges that the model has stored, tensor by tensor.

    Each batch runs through the converted model and, in parallel, through the same graph in float
    with the kernels' real weights. The recipe's observers see the float values as in calibration
    and find the ranges of today (a moving average weighs all batches equally). The same values give
    the share that the stored range clips, and the SQNR with the stored and with today's range.

    ``converted`` comes from `qrecipe.quantize` or `qrecipe.load_quantized`; ``batches`` and
    ``forward`` are as in `qrecipe.calibrate`. Memory does not grow with the batches.

    Raises:
        ArtifactError: ``converted`` was not converted by qrecipe (QR501).
        CalibrationError: there are no batches, none has values, or the model cannot take one.
        ExecutionError: the model has no stored ranges (QR430): it is dynamic or float, or a
            session of another runtime.
    """
    known = known_session(converted)
    if known is not None:
        raise _outputs_alone(type(converted).__name__)
    plan = Plan.from_json(provenance(converted).plan)
    observing = Observing()
    shadows = {
        path: _Shadowed(part, plan, observing) for path, part in converted_graphs(converted).items()
    }
    if not any(shadow.tallies for shadow in shadows.values()):
        raise _nothing_stored()
    _warn_about(observing, converted)
    model = with_parts(converted, shadows)
    show = chosen_progress(progress, "measuring drift")
    count = 0
    with engine_of(plan):
        for batch in limited(batches):
            check_finite(batch, count)
            run_quietly(model, batch, count, forward)
            count += 1
            show(count, None)
    if not count:
        raise no_batches()
    sites = [site for shadow in shadows.values() for site in shadow.results()]
    if all(site.is_unseen for site in sites):
        raise _no_values(count)
    return Drift(tuple(sorted(sites, key=worst_first)), count, plan.ingredients)


def _nothing_stored() -> ExecutionError:
    return ExecutionError.of(
        "QR430",
        "this model stores no activation ranges that could drift",
        hint="dynamic kernels find ranges at run time; only static rules store them",
    )


def _no_values(batches: int) -> CalibrationError:
    return CalibrationError.of(
        "QR401",
        f"no value reached a stored range in {counted(batches, 'batch')}",
        hint="are the batches empty, or does forward not call the model?",
    )


def _warn_about(observing: Observing, converted: nn.Module) -> None:
    if not observing.missing:
        return
    names = ", ".join(f'"{name}"' for name in sorted(observing.missing))
    finding = Finding(
        "QR213",
        f"observer {names} is not available: minimum and maximum are used instead",
        hint="install the plugin, or import the module that registers it, to get its ranges",
        notes=tuple(sorted(set(observing.missing.values()))),
    )
    warn(finding, _lint(converted).ignore)


def _lint(converted: nn.Module) -> LintTable:
    """The ``[lint]`` table of the stored recipe, whose plugins may be missing here."""
    stored = compose(Source("<recipe>"), provenance(converted).recipe)
    return RecipeTable.model_validate(stored.values).lint


def _outputs_alone(kind: str) -> ExecutionError:
    return ExecutionError.of(
        "QR430",
        f"this {kind} gives outputs alone: the ranges of its sites cannot be compared with data",
        hint="pass the converted model that the file was made from; compare takes a session",
    )


class _Shadowed(nn.Module):
    """A converted graph that runs as it is and also in float, with tallies of its ranges."""

    def __init__(self, part: fx.GraphModule, plan: Plan, observing: Observing) -> None:
        super().__init__()
        self.part = part
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

    def results(self) -> Iterator[SiteDrift]:
        count: dict[tuple[str, str], int] = {}
        for node, tally in self.tallies.items():
            key = tally.stored.site.name, tally.stored.role
            count[key] = count.get(key, 0) + 1
            now = self._observers[self._groups[node]].range()
            yield tally.result(now, count[key])


class _Run(Interpreter):
    """Runs every node twice for one batch: on the model's values and on float values."""

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
