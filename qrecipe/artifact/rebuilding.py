"""A stored plan applied to the float architecture: the converted model without its state.

Nothing is decided, calibrated or run. Observers only have to return some scale, so torch's own
replace those of plugins.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverloadPacket
from torch.overrides import TorchFunctionMode

from qrecipe._version import __version__
from qrecipe.artifact.container import problem
from qrecipe.artifact.metadata import StoredModel
from qrecipe.errors.findings import error_from
from qrecipe.errors.spelling import did_you_mean
from qrecipe.errors.text import one_line, shown
from qrecipe.execution.executors import executor_of
from qrecipe.execution.packing import Unpacked
from qrecipe.execution.part import Recorded
from qrecipe.model.architecture import check_same, module_settings
from qrecipe.model.caches import with_layers_made
from qrecipe.model.checks import attribute_findings
from qrecipe.model.graph_sites import Inventory, Match, structure_of
from qrecipe.model.opened.opening import opened_at
from qrecipe.model.record import Architecture, TracedPart
from qrecipe.model.roots import root_findings
from qrecipe.model.scaled_input import with_scaled_inputs
from qrecipe.planning.asked import PACK
from qrecipe.planning.backend import Outcome, outcomes, saturating
from qrecipe.planning.convolution import convolution_of
from qrecipe.planning.engines import around_wrong_kernel
from qrecipe.planning.large_layers import has_choice
from qrecipe.planning.plan import Plan, Site
from qrecipe.process.warnings import held_back
from qrecipe.recipe.patterns import is_exact
from qrecipe.recipe.recipe import QConfigSpec, Rule
from qrecipe.recipe.schema import Constructor, TensorSpec, TransformTable
from qrecipe.rules.resolution import Decision, describe, resolve
from qrecipe.rules.structure import joined

_MEMORYLESS = ("placeholder", "fixed_qparams")
"""Observers that know their range, or need none, and decide what torch inserts."""


def rebuilt(model: nn.Module, stored: StoredModel, constants: Constants) -> nn.Module:
    """The converted model of the plan, with state of the right shapes and meaningless values.

    ``model`` is not changed, its weights don't matter, and nothing of it is in the result. Raises
    ``ArchitectureError``, ``PlanError`` if the recipe could not be planned for the model, and
    ``ArtifactError`` if its forward would have to be traced with other constants, or the plan is
    not the recipe's.
    """
    recorded = recorded_with(model, stored, constants)
    with _valueless(), held_back([("", Warning)]):  # about observers that saw nothing
        return executor_of(recorded.plan.executor).rebuilt(recorded).eval()


def recorded_with(model: nn.Module, stored: StoredModel, constants: Constants) -> Recorded:
    """The float architecture with the plan of a stored model, as executors carry it out.

    Raises as `rebuilt`.
    """
    architecture, table = stored.contents.architecture, stored.recipe.fx
    unfit = (
        *attribute_findings(model, table.preserved_attributes),
        *root_findings(model, table.roots),
    )
    if unfit:
        raise error_from(unfit)
    if module_settings(model) != architecture.modules:
        model = with_layers_made(model, architecture.parts) or model
    check_same("module", architecture.modules, module_settings(model))
    model = opened_at(_with_products(model, stored.plan), architecture.opened)
    architecture = with_own_constants(architecture, model, constants, stored.header.file)
    plan = _without_plugins(stored.plan, model)
    return Recorded(model, plan, architecture, table, partial(check_agreement, stored))


def _with_products(model: nn.Module, plan: Plan) -> nn.Module:
    """The model with the products that transforms put into it; the file has their values."""
    groups = [group.sites for group in plan.groups if group.is_product]
    return with_scaled_inputs(model, groups) if groups else model


class _valueless(TorchFunctionMode):  # noqa: N801 - reads as what it does in a with statement
    """Neither quantizes nor packs weights: their values are in the file."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, OpOverloadPacket) and _PACKS.match(func._qualified_op_name):
            names = [argument.name for argument in func.default._schema.arguments]
            given = dict(zip(names, (*args, *map(kwargs.get, names[len(args) :])), strict=True))
            if torch.backends.quantized.engine == "qnnpack":
                _give_bias(given)
            return Unpacked(func, tuple(given.values()))
        if args and isinstance(args[0], Tensor):
            func = _VALUELESS.get(func, func)
        return func(*args, **kwargs)


_PACKS = re.compile(r"quantized::(\w+_prepack(_fp16)?|make_quantized_cell_params_(dynamic|fp16))$")


def _give_bias(given: dict[str, Any]) -> None:
    """To a layer without one, as QNNPACK does when it packs the weight."""
    weight, bias = ("W", "B") if "W" in given else ("weight", "bias")
    if given.get(bias, weight) is None:
        is_transposed = "output_padding" in given
        channels = given[weight].size(1) * given["groups"] if is_transposed else len(given[weight])
        given[bias] = torch.zeros(channels)


def _per_tensor(input: Tensor, scale: Any, zero_point: Any, dtype: torch.dtype) -> Tensor:
    made = torch._empty_affine_quantized(
        input.shape, scale=float(scale), zero_point=int(zero_point), dtype=dtype
    )
    return _small(made)


def _per_channel(
    input: Tensor, scales: Tensor, zero_points: Tensor, axis: int, dtype: torch.dtype
) -> Tensor:
    made = torch._empty_per_channel_affine_quantized(
        input.shape, scales=scales, zero_points=zero_points, axis=axis, dtype=dtype
    )
    return made if dtype is torch.quint4x2 else _small(made)


def _small(quantized: Tensor) -> Tensor:
    """The same tensor on the memory of a single value."""
    value = torch.zeros(1, dtype=torch.uint8).untyped_storage()
    return quantized.set_(value, 0, quantized.size(), [0] * quantized.dim())


_VALUELESS: Mapping[Any, Callable[..., Tensor]] = {
    torch.quantize_per_tensor: _per_tensor,
    torch.quantize_per_channel: _per_channel,
}


def _without_plugins(plan: Plan, model: nn.Module) -> Plan:
    """The plan with the model's other names of modules, and with observers of torch's own."""
    sites = tuple(replace(site, qconfig=_with_builtins(site.qconfig)) for site in plan)
    structure = replace(plan.structure, aliases=structure_of(model, {}).aliases)
    return replace(plan, sites=sites, structure=structure)


def _with_builtins(qconfig: QConfigSpec | None) -> QConfigSpec | None:
    if qconfig is None:
        return None
    return QConfigSpec(_builtin(qconfig.weight), _builtin(qconfig.activation))


def _builtin(spec: TensorSpec | None) -> TensorSpec | None:
    """The spec with one of torch's observers that gives scales of the same shape."""
    if spec is None:
        return None
    observer = spec.observer
    if observer is not None and observer.name not in _MEMORYLESS:
        per_channel = (spec.qscheme or "").startswith("per_channel")
        observer = Constructor(name="per_channel_minmax" if per_channel else "minmax")
    return spec.model_copy(update={"observer": observer, "fake_quant": None})


def check_agreement(stored: StoredModel, inventory: Inventory) -> None:
    """Check that the plan has the rules and the outcomes that the recipe gives the model's sites.

    What a backend can do is only compared if the same releases of qrecipe and torch made the file.
    Raises ArtifactError (QR505).
    """
    if found := [*_contradictions(stored, inventory)]:
        what = "has a plan that contradicts its recipe"
        raise problem("QR505", stored.header.file, what, differences=found)


def _contradictions(stored: StoredModel, inventory: Inventory) -> Iterator[str]:
    plan = stored.plan
    if {verdict.rule for verdict in plan.rules} != {rule.as_written for rule in stored.rules}:
        yield "the plan lists other rules"
    yield from _other_transforms(plan, stored.recipe.transform)
    yield from _without_kernel(plan, inventory)
    decisions = dict(resolve(inventory.structure, stored.rules).decisions)
    for site in plan:
        rule = _rule_of(site, decisions[site.name])
        if rule is None:
            says = describe(decisions[site.name].rule)
            yield f"{site.name} was decided by {describe(site.rule)}, but the recipe says {says}"
            return
        decisions[site.name] = replace(decisions[site.name], rule=rule)
    expected: Mapping[str, Outcome] = {}
    here = {"qrecipe": __version__, "torch": torch.__version__}
    if here.items() <= stored.contents.versions.items():
        expected = outcomes(inventory, decisions, plan.backend, plan.phase, plan.executor)
        if plan.needs_vnni != bool(saturating(inventory, expected, plan.backend)):
            yield "the plan does not say whether kernels saturate without VNNI"
    for site in plan:
        rule, match = decisions[site.name].rule, inventory.matches[site.name]
        if site.verdict == "float" and not site.reason:
            yield f"{site.name} is float without a reason"
        elif site.verdict == "quantized" and rule.qconfig is None:
            yield f"{site.name} is quantized, and {describe(rule)} leaves it float"
        elif site.name in expected and _outcome(site, match) != _outcome(
            expected[site.name], match
        ):
            found, wanted = site.verdict, expected[site.name].verdict
            said = f"{found}, not {wanted}" if found != wanted else f"{found} in another way"
            yield f"{site.name} is {said} as {describe(rule)} asks ({shown(rule.label)})"


def _without_kernel(plan: Plan, inventory: Inventory) -> Iterator[str]:
    """Sites that no engine may run, whichever release made the plan: they could end the process."""
    for site in plan:
        shape = convolution_of(inventory.matches[site.name])
        if shape is not None and site.qconfig is not None and plan.executor in PACK:
            own = site.engine or plan.backend
            found = around_wrong_kernel(shape, own, site.qconfig.weight)
            if isinstance(found, str):
                yield f"{site.name} has no kernel that is right: {found}"


def _other_transforms(plan: Plan, table: TransformTable) -> Iterator[str]:
    if not table.changes:  # the plan has what was done to the model before
        return
    if plan.chains and table.equalize is None:
        yield "the plan has chains, and the recipe does not equalize"
    if plan.groups and table.smooth is None:
        yield "the plan has groups, and the recipe does not smooth"
    if [step.name for step in plan.steps] != list(table.plugins):
        yield "the plan lists other transforms"


def _rule_of(site: Site, decision: Decision) -> Rule | None:
    """The rule of the recipe that decided the site, if it is one that can.

    A resolved recipe does not say which of its globs came from an extended recipe and are beaten.
    """
    winner = decision.rule
    rivals = [
        rule
        for rule in decision.shadowed
        if rule.tier == winner.tier and not is_exact(rule.key) and not is_exact(winner.key)
    ]
    return next((rule for rule in (winner, *rivals) if rule.as_written == site.rule), None)


def _outcome(decided: Site | Outcome, match: Match) -> tuple[object, ...]:
    # nothing in the file gives the size of the example
    engine = None if has_choice(match) else decided.engine
    return decided.verdict, decided.mode, decided.qconfig, engine


Constants = Mapping[str, bool | int | float | str | None]
"""Arguments by name; those of a root follow its path and a dot."""

_LONGEST_HINT = 300


def with_own_constants(
    architecture: Architecture, model: nn.Module, given: Constants, file: str
) -> Architecture:
    """The architecture with the values that the caller gives, or else with forward's defaults.

    Tracing runs the caller's forward, so no value in a file may choose its branches or the number
    of its loops. Raises ArtifactError (QR507) if the file has others.
    """
    if not isinstance(given, Mapping):
        what = f"needs constants as a mapping by name, not {shown(type(given).__name__)}"
        raise problem("QR507", file, what)
    recorded = {
        joined(part.path, name): value
        for part in architecture.parts
        for name, value in part.constants.items()
    }
    for name in given:
        if name not in recorded:
            what = f"was made without a constant argument {shown(name)} of forward"
            raise problem("QR507", file, what, did_you_mean(name, recorded))
    own = {part.path: _own(part, model, given) for part in architecture.parts}
    values = {joined(path, name): value for path, own in own.items() for name, value in own.items()}
    others = {name: value for name, value in recorded.items() if not _is_same(value, values[name])}
    if others:
        consent = one_line(f"constants={others}")
        if len(consent) > _LONGEST_HINT:
            consent = "constants={...}"
        raise problem(
            "QR507",
            file,
            "was made with arguments that are neither the defaults of forward nor given here",
            f"if the model may be traced with them: load_quantized(..., {consent})",
            [_difference(name, value, values[name]) for name, value in others.items()],
        )
    parts = tuple(
        part.model_copy(update={"constants": own[part.path]}) for part in architecture.parts
    )
    return architecture.model_copy(update={"parts": parts})


def _own(part: TracedPart, model: nn.Module, given: Constants) -> dict[str, Any]:
    parameters = inspect.signature(model.get_submodule(part.path).forward).parameters
    defaults = {name: each.default for name, each in parameters.items()}
    return {
        name: given.get(joined(part.path, name), defaults.get(name, inspect.Parameter.empty))
        for name in part.constants
    }


def _is_same(recorded: Any, own: Any) -> bool:
    # as JSON, in which NaN equals itself, and 1 equals neither 1.0 nor True
    is_plain = isinstance(own, (bool, int, float, str, NoneType))
    return is_plain and json.dumps(own) == json.dumps(recorded)


def _difference(name: str, recorded: Any, own: Any) -> str:
    here = "without a default" if own is inspect.Parameter.empty else f"{shown(own)} here"
    return f"{shown(name)} is {shown(recorded)} in the file, {here}"
