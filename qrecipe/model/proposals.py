"""Proposals for ``[fx]`` if a model cannot be traced, tried before they are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from torch import nn

from qrecipe.errors.findings import PlanError, TraceError
from qrecipe.errors.text import quoted_whole
from qrecipe.model.caches import with_caches_filled
from qrecipe.model.call import Inputs, on_few
from qrecipe.model.dry_run import first_calls
from qrecipe.model.roots import prove_whole
from qrecipe.model.trace import trace_part
from qrecipe.model.trace_proof import record_values
from qrecipe.model.untraceable import UntraceableError
from qrecipe.recipe.schema import FxTable
from qrecipe.rules.structure import enclosing

_MOST_KEPT_OUT = 50

_REWRITE = (
    "rewrite this line without control flow on tensors, or move what can be traced into a "
    "submodule and name that in [fx] roots"
)
OF_TORCH = (
    "torch runs it as one operation, so rules cannot reach inside; they do reach the "
    "torch.nn.Linear of your own modules"
)
"""Why the layers in torch's own encoders and attention stay float, and what to do about it."""


def with_advice(error: TraceError, model: nn.Module, inputs: Inputs, table: FxTable) -> TraceError:
    """The error with the recipe keys with which the model can be traced.

    Raises ``PlanError`` like `dry_run.try_inputs`, if it is not the trace that fails.
    """
    (finding,) = error.findings
    if not isinstance(error, UntraceableError):
        return error
    model = with_caches_filled(model, {"": inputs}) or model
    calls = _calls(model, inputs)
    proposed = [] if finding.hint is None else [finding.hint]
    kept_out = _kept_out(error, model, calls, table)
    roots = _roots(model, error.path, inputs, table, calls)
    if kept_out and not (roots and _hold_most(model, error.path, kept_out)):
        names = _toml_list(kept_out)
        proposed.append(
            f"do not trace it, and leave it float: [fx] non_traceable_module_name = {names}"
        )
    if roots:
        proposed.append(f"trace the parts that can be traced: [fx] roots = {_toml_list(roots)}")
    forward = type(model.get_submodule(error.at)).forward
    is_torchs = forward.__module__.startswith("torch.nn.modules")
    hint, *others = proposed or [OF_TORCH if is_torchs else _REWRITE]
    notes = tuple(f"or {other}" for other in others)
    return TraceError(replace(finding, hint=hint, notes=notes))


def traceable_parts(model: nn.Module, inputs: Inputs) -> list[str]:
    """The outermost called containers with parameters that can be traced on their own.

    ``[fx] roots`` could name them. Raises ``PlanError`` like `dry_run.try_inputs`.
    """
    model = with_caches_filled(model, {"": inputs}) or model
    return _roots(model, "", inputs, FxTable(), _calls(model, inputs))


def _toml_list(names: Sequence[str]) -> str:
    return f"[{', '.join(map(quoted_whole, names))}]"


def _kept_out(
    error: UntraceableError, model: nn.Module, calls: Mapping[str, Inputs], table: FxTable
) -> list[str]:
    """The modules without which the part can be traced; none if its own forward fails."""
    names = list(table.non_traceable_module_name)
    at = error.at
    while at not in (error.path, *names) and len(names) < _MOST_KEPT_OUT:
        names.append(at)
        tried = table.model_copy(update={"non_traceable_module_name": tuple(names)})
        try:
            _prove(model, error.path, calls, tried)
        except UntraceableError as another:
            at = another.at
        except PlanError:
            return []
        else:
            return names
    return []


def _hold_most(model: nn.Module, part: str, names: Sequence[str]) -> bool:
    """Whether these modules hold more than half of the weights of a part."""
    inside = (model.get_submodule(name) for name in names if part in enclosing(name))
    held = {weight for module in inside for weight in module.parameters()}
    weights = [*model.get_submodule(part).parameters()]
    return 2 * sum(w.numel() for w in held) > sum(w.numel() for w in weights)


def _roots(
    model: nn.Module, failed: str, inputs: Inputs, table: FxTable, calls: Mapping[str, Inputs]
) -> list[str]:
    """The roots of the table that can be traced, and parts of the others.

    Code around a part may look into it, so they are also tested in the whole model.
    """
    graphs: dict[str, nn.Module] = {}
    for root in table.roots or ("",):
        graphs |= _traceable(model, root, calls, table, tried=root == failed)
    if graphs and not _fits(model, graphs, inputs):
        graphs = {
            path: graph for path, graph in graphs.items() if _fits(model, {path: graph}, inputs)
        }
    return list(graphs)


def _fits(model: nn.Module, graphs: Mapping[str, nn.Module], inputs: Inputs) -> bool:
    try:
        prove_whole(model, graphs, inputs)
    except Exception:
        return False
    return True


def _traceable(
    model: nn.Module, path: str, calls: Mapping[str, Inputs], table: FxTable, *, tried: bool
) -> dict[str, nn.Module]:
    """The graphs of the outermost parts that are called, have parameters and can be traced.

    The part at ``path`` comes first, unless it was ``tried`` already.
    """
    found: dict[str, nn.Module] = {}
    for inner, module in model.get_submodule(path).named_modules(prefix=path):
        if inner not in calls or next(module.parameters(), None) is None:
            continue
        if found.keys() & enclosing(inner) or (tried and inner == path):
            continue
        with suppress(Exception):
            found[inner] = _prove(model, inner, calls, table)
    return found


def _prove(model: nn.Module, path: str, calls: Mapping[str, Inputs], table: FxTable) -> nn.Module:
    """The proven graph of a part. Raises ``PlanError`` if there is none."""
    part, inputs = model.get_submodule(path), calls[path]
    graph = trace_part(model, path, inputs, table).graph_module
    record_values(graph, part, inputs)
    return graph


def _calls(model: nn.Module, inputs: Inputs) -> dict[str, Inputs]:
    """The first inputs of the model and each container in it, in a run on a few samples.

    All samples are used if the model does not accept so few. Raises ``PlanError`` like
    `try_inputs`.
    """
    paths = [path for path, module in model.named_modules() if not path or list(module.children())]
    return on_few(inputs, lambda few: first_calls(model, paths, few))
