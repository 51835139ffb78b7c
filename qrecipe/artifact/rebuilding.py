"""A stored plan applied to the float architecture: the converted model without its state.

Nothing is decided, calibrated or run. Observers only have to return some scale, so torch's own
replace those of plugins.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe._torch_fx import ConvertCustomConfig, PrepareCustomConfig
from qrecipe.artifact.metadata import Contents
from qrecipe.execution.eager.part import EagerPart
from qrecipe.execution.fx import convert as execution
from qrecipe.execution.fx.emission import erase_keep_float
from qrecipe.execution.fx.padding import pad_explicitly
from qrecipe.execution.fx.parts import Configs, compile_part
from qrecipe.model.architecture import differences_of, note_values, setting_differences
from qrecipe.model.call import Inputs
from qrecipe.model.copies import own_all_tensors, with_parts
from qrecipe.model.graph_sites import (
    Match,
    Part,
    fused_graph,
    module_names,
    named_sites,
    traced_graph,
)
from qrecipe.model.record import TracedPart
from qrecipe.model.trace_proof import Example
from qrecipe.planning.backend import backend_config
from qrecipe.planning.plan import Engine, Plan
from qrecipe.process.warnings import held_back
from qrecipe.recipe.recipe import QConfigSpec
from qrecipe.recipe.schema import Constructor, FxTable, TensorSpec

_MEMORYLESS = ("placeholder", "fixed_qparams")
"""Observers that know their range, or need none, and decide what torch inserts."""


class ArchitectureError(Exception):
    """The model is not the one that was quantized; ``differences`` says where."""

    def __init__(self, differences: list[str]) -> None:
        super().__init__(differences)
        self.differences = differences


def rebuilt(model: nn.Module, contents: Contents, plan: Plan, table: FxTable) -> nn.Module:
    """The converted model that the plan gave, with state of the right shapes and of no meaning.

    ``model`` is not changed, and its weights don't matter. Raises `ArchitectureError`.
    """
    _raise_if_any(setting_differences(contents.architecture, model))
    blank = without_weights(model)
    decided = _without_plugins(plan, blank)
    with held_back([("", Warning)]):  # about observers that saw nothing
        if plan.executor == "eager":
            whole = _swapped(blank, decided)
        else:
            preserved = {name: getattr(model, name) for name in table.preserved_attributes}
            whole = _traced(blank, contents, decided, table, preserved)
    own_all_tensors(whole)
    return whole.eval()


def _swapped(blank: nn.Module, plan: Plan) -> nn.Module:
    """The model with the planned modules swapped for quantized ones."""
    modules = {path: type(module).__name__ for path, module in blank.named_modules()}
    planned = {site.name: site.op for site in plan.sites}
    own = {name: modules[name] for name in planned if name in modules}
    _raise_if_any(differences_of("site", planned, own))
    return EagerPart("", plan, blank, Inputs()).swapped(blank)


def _traced(
    blank: nn.Module,
    contents: Contents,
    plan: Plan,
    table: FxTable,
    preserved: Mapping[str, Any],
) -> nn.Module:
    """The model with its traced parts replaced by converted graphs."""
    configs = Configs(
        plan.backend,
        backend_config(plan.backend, plan.phase),
        PrepareCustomConfig().set_preserved_attributes(list(preserved)),
        ConvertCustomConfig().set_preserved_attributes(list(preserved)),
    )
    fused = [_fused_part(blank, part, plan, table, configs) for part in contents.architecture.parts]
    _check_sites({name: site for part in fused for name, site in part.matches.items()}, plan)
    return with_parts(
        blank, {part.part.path: _converted(part.part, plan, configs, preserved) for part in fused}
    )


def without_weights(model: nn.Module) -> nn.Module:
    """A copy in eval mode with zeros for parameters and for buffers without values."""
    tensors = [
        *model.parameters(),
        *(tensor for tensor in _plain_tensors(model) if tensor.is_meta),
    ]
    zeros = {id(tensor): _zeros(tensor) for tensor in tensors}
    return copy.deepcopy(model, zeros).eval()


def _plain_tensors(model: nn.Module) -> list[Tensor]:
    """Buffers, and plain tensor attributes."""
    attributes = chain.from_iterable(vars(module).values() for module in model.modules())
    return [*model.buffers(), *(value for value in attributes if isinstance(value, Tensor))]


def _zeros(tensor: Tensor) -> Tensor:
    zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(zeros, tensor.requires_grad) if is_parameter else zeros


def _converted(
    part: Part, plan: Plan, configs: Configs, preserved: Mapping[str, Any]
) -> fx.GraphModule:
    for name, tensor in part.graph_module.named_parameters():
        if not torch.isfinite(tensor).all():  # folded from a buffer with arbitrary values
            part.graph_module.get_parameter(name).data.zero_()
    compiled = compile_part(plan, part, configs, preserved, ())
    # not compiled.prepare: its fake-quants don't observe in eval mode, and these must see the
    # shapes of their weights once
    prepared = execution.prepared_copy(
        compiled.graph_module,
        compiled.emission,
        configs.backend_config,
        configs.prepare,
        preserved,
        plan.phase,
    ).eval()
    reference = execution.reference(prepared, configs.backend_config, configs.convert)
    if plan.is_for_export:
        pad_explicitly(reference)
        erase_keep_float(reference)
        return reference
    return execution.lowered(
        reference, prepared, configs.backend, configs.convert, compiled.plan.engines
    )


@dataclass(frozen=True, slots=True)
class _Fused:
    """A part that was traced again, with its sites."""

    part: Part
    matches: Mapping[str, Match]


def _fused_part(
    blank: nn.Module, recorded: TracedPart, plan: Plan, table: FxTable, configs: Configs
) -> _Fused:
    graph_module, scopes = traced_graph(blank, recorded.path, recorded.constants, table)
    _raise_if_any(note_values(recorded, graph_module))
    config = configs.backend_config
    alone = {site.members for site in plan.sites}

    def is_apart(node: fx.Node) -> bool:
        return (node.meta["member"].name,) in alone

    graph_module = fused_graph(
        graph_module, scopes, recorded.path, config, plan.phase, apart=is_apart
    )
    part = Part(recorded.path, graph_module, Inputs(), recorded, Example(Inputs(), None))
    return _Fused(part, named_sites(graph_module, config, plan.phase))


def _check_sites(found: Mapping[str, Match], plan: Plan) -> None:
    planned = {site.name: ", ".join(site.members) for site in plan.sites}
    own = {
        name: ", ".join(member.name for member in match.operation.members)
        for name, match in found.items()
    }
    _raise_if_any(differences_of("site", planned, own))


def _raise_if_any(differences: Iterable[str]) -> None:
    found = list(differences)
    if found:
        raise ArchitectureError(found)


def detoured(
    whole: nn.Module, plan: Plan, paths: Iterable[str]
) -> dict[tuple[nn.Module, str], Engine]:
    """The engine of each packed weight that does not use the backend's, by module and attribute."""
    engines = plan.engines
    found: dict[tuple[nn.Module, str], Engine] = {}
    for path in paths:
        part = whole.get_submodule(path)
        assert isinstance(part, fx.GraphModule)
        for owner, name, site in execution.packed_sites(part):
            if site in engines:
                found[owner, name] = engines[site]
    return found


def _without_plugins(plan: Plan, model: nn.Module) -> Plan:
    """The plan with the model's other names of modules, and with observers of torch's own."""
    sites = tuple(
        site
        if site.qconfig is None
        else replace(
            site,
            qconfig=QConfigSpec(_builtin(site.qconfig.weight), _builtin(site.qconfig.activation)),
        )
        for site in plan
    )
    structure = replace(plan.structure, aliases=module_names(model)[1])
    return replace(plan, sites=sites, structure=structure)


def _builtin(spec: TensorSpec | None) -> TensorSpec | None:
    """The spec with one of torch's observers that gives scales of the same shape."""
    if spec is None or spec.observer is None or spec.observer.name in _MEMORYLESS:
        return spec
    per_channel = (spec.qscheme or "").startswith("per_channel")
    name = "per_channel_minmax" if per_channel else "minmax"
    return spec.model_copy(update={"observer": Constructor(name=name), "fake_quant": None})
