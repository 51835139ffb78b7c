"""The sites of a model for a recipe: traced, or module by module if that is enough."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from torch import nn

from qrecipe.errors.findings import Finding, PlanError, TraceError, UnsupportedError, error_from
from qrecipe.errors.text import quoted_whole
from qrecipe.errors.warn import warn
from qrecipe.model.call import EMPTY, Inputs, is_empty
from qrecipe.model.checks import check_model
from qrecipe.model.dry_run import CANNOT_TAKE
from qrecipe.model.exported import exported_part
from qrecipe.model.graph_sites import Inventory, Tracing, prove, take_inventory
from qrecipe.model.module_sites import take_inventory as eager_inventory
from qrecipe.model.opened.activations import is_activation
from qrecipe.model.opened.linear import is_linear
from qrecipe.model.opened.opening import Opening, opened_at, opening_of, proven
from qrecipe.model.proposals import with_advice
from qrecipe.model.remedies import remedy
from qrecipe.model.trace import trace_part
from qrecipe.model.trace_proof import DifferentGraphError, of_export
from qrecipe.model.untraceable import UntraceableError
from qrecipe.observers.loading import load_plugins
from qrecipe.planning.asked import ASKED, TRAIN
from qrecipe.planning.backend import mode_of, own_backend_config
from qrecipe.recipe.recipe import Recipe, Rule, load_recipe
from qrecipe.rules.resolution import describe, resolve


def inventory_of(model: nn.Module, recipe: Recipe, inputs: Inputs) -> Inventory:
    """The model traced and fused as the recipe says, and its sites.

    Raises ``PlanError``, with the location in the recipe if that is at fault.
    """
    inventory = unproven_inventory_of(model, recipe, inputs)
    with _located(model, recipe, inputs):
        prove(inventory, inputs)
    return inventory


def unproven_inventory_of(model: nn.Module, recipe: Recipe, inputs: Inputs) -> Inventory:
    """As `inventory_of`, but that the fused graphs compute the same as the model is not proven."""
    load_plugins(recipe)
    with _located(model, recipe, inputs):
        check_model(model, recipe)
        _check_training(recipe)
        if is_empty(inputs.batch):
            raise PlanError(Finding("QR307", f"{CANNOT_TAKE}{EMPTY}", hint="pass a few samples"))
        inventory = _inventory_of(model, opening_of(model, inputs, recipe.fx), recipe, inputs)
    for finding in inventory.doubts:
        warn(finding, recipe.lint.ignore)
    return inventory


@contextmanager
def _located(model: nn.Module, recipe: Recipe, inputs: Inputs) -> Iterator[None]:
    """Complete the findings of a ``PlanError``."""
    try:
        yield
    except PlanError as error:
        raise error_from(
            _completed(finding, model, recipe, inputs) for finding in error.findings
        ) from error


def _inventory_of(model: nn.Module, opening: Opening, recipe: Recipe, inputs: Inputs) -> Inventory:
    """The inventory of the opened model; layers that cannot be traced once opened stay whole."""
    opened = opened_at(model, opening.paths)
    if recipe.executor == "eager":
        return _completed_by(opening, _asked_inventory(opened, recipe, inputs))
    try:
        inventory = _traced(opened, recipe, inputs)
    except TraceError as error:
        at = error.at if isinstance(error, UntraceableError) else None
        less = None if at is None else opening.without(at, error.findings[0].message)
        if less is not None:
            return _inventory_of(model, less, recipe, inputs)
        untraced: Inventory | None = None
        if recipe.executor == "pt2e":
            untraced = _exported(opened, recipe, inputs, error)
        elif recipe.executor is None:
            untraced = _untraced_inventory(opened, recipe, inputs, error)
        if untraced is None:
            advised = with_advice(error, opened, inputs, recipe.fx)
            explained = _with_reason(advised, at, opening)
            raise _with_other_ways(explained, opened, recipe, inputs) from error
        inventory = untraced
    return _completed_by(opening, inventory)


def _with_reason(error: TraceError, at: str | None, opening: Opening) -> TraceError:
    """The error with the reason why the layer that cannot be traced is not opened."""
    if at is None or at not in opening.whole:
        return error
    (finding,) = error.findings
    reason = f"{quoted_whole(at)} is not opened: {opening.whole[at]}"
    return TraceError(replace(finding, notes=(*finding.notes, reason)))


def _traced(
    model: nn.Module, recipe: Recipe, inputs: Inputs, tracing: Tracing = trace_part
) -> Inventory:
    config = own_backend_config(recipe.backend)
    return take_inventory(model, inputs, recipe.fx, config, recipe.phase, tracing)


def _exported(model: nn.Module, recipe: Recipe, inputs: Inputs, traced: TraceError) -> Inventory:
    """The inventory of what torch.export makes of a model; its errors say why no trace does."""
    try:
        return _traced(model, recipe, inputs, exported_part)
    except TraceError as error:
        (finding,) = error.findings
        if isinstance(error, DifferentGraphError):
            finding = of_export(error)
        why = f"without torch.export: {traced.findings[0].message}"
        raise TraceError(replace(finding, notes=(*finding.notes, why))) from error


def _with_other_ways(
    error: TraceError, model: nn.Module, recipe: Recipe, inputs: Inputs
) -> TraceError:
    """The error with what needs no trace; it is tried, as everything that is proposed."""
    ways = []
    asked = {mode_of(rule.qconfig) for rule in recipe.rules if rule.qconfig and not rule.optional}
    if "static" in asked and _is_dynamic_enough(model, recipe, inputs, error):
        what = "quantize linear and recurrent layers alone, which needs no trace"
        ways.append(f'{what}: extends = "{_DYNAMIC}"')
    if recipe.phase == "qat" or "static" in asked:
        with suppress(PlanError):
            prove(_traced(model, recipe, inputs, exported_part), inputs)
            ways.append('let PT2E execute the program of torch.export: executor = "pt2e"')
    (finding,) = error.findings
    return TraceError(replace(finding, notes=(*finding.notes, *(f"or {way}" for way in ways))))


_DYNAMIC = "builtin:x86-dynamic"


def _is_dynamic_enough(model: nn.Module, recipe: Recipe, inputs: Inputs, error: TraceError) -> bool:
    """Whether a dynamic recipe reaches the layers of a model, which has no convolutions."""
    dynamic = load_recipe(_DYNAMIC)
    if recipe.phase == "qat" or recipe.executor is not None or recipe.backend != dynamic.backend:
        return False
    with suppress(PlanError):
        found = _untraced_inventory(model, dynamic, inputs, error)
        return found is not None and not any(
            match.operation.op.startswith("Conv") for match in found.matches.values()
        )
    return False


def _completed_by(opening: Opening, inventory: Inventory) -> Inventory:
    """The inventory with what is opened, and why other layers are not."""
    matches = {
        name: replace(match, whole=opening.whole.get(name.partition("#")[0], match.whole))
        for name, match in inventory.matches.items()
    }
    return replace(inventory, matches=matches, opened=(*opening.paths, *inventory.opened))


def _completed(finding: Finding, model: nn.Module, recipe: Recipe, inputs: Inputs) -> Finding:
    """The finding with its location in the recipe, or a hint how to change the inputs."""
    if finding.key is not None:
        return replace(finding, location=recipe.origin(finding.key))
    helping = remedy(model, inputs.batch) if finding.code == "QR307" else None
    return finding if helping is None else replace(finding, hint=helping.value)


def _untraced_inventory(
    model: nn.Module, recipe: Recipe, inputs: Inputs, error: TraceError
) -> Inventory | None:
    """The sites for eager mode, or None if rules ask for more than modules that need no trace."""
    if recipe.phase == "qat" or any(_needs_graph(recipe)):
        return None
    static = any(rule.qconfig and mode_of(rule.qconfig) == "static" for rule in recipe.rules)
    try:
        inventory = _by_modules(model, recipe, inputs, error.findings[0])
    except PlanError:
        if static:
            return None
        raise  # the model or its inputs are at fault, traced or not
    decided = _deciding(inventory, recipe)
    is_left_float = any(rule.tier == "module_name" and rule.is_float for rule in decided)
    is_for_modules = is_left_float or any(rule.qconfig for rule in decided)
    return None if not is_for_modules or any(_need_values(decided, recipe)) else inventory


def _asked_inventory(model: nn.Module, recipe: Recipe, inputs: Inputs) -> Inventory:
    """The sites for eager mode, which the recipe asks for.

    Raises ``UnsupportedError`` (QR316) if the recipe asks for more than eager mode can do.
    """
    why = Finding("QR210", ASKED)
    findings = list(_needs_graph(recipe))
    if not findings:
        inventory = _by_modules(model, recipe, inputs, why)
        findings = list(_need_values(_deciding(inventory, recipe), recipe))
    if findings:
        raise error_from(findings)
    return inventory


def _by_modules(model: nn.Module, recipe: Recipe, inputs: Inputs, why: Finding) -> Inventory:
    """The leaf modules; one that computes what torch's linear layer or activation does is that."""
    config = own_backend_config(recipe.backend)
    inventory = eager_inventory(model, inputs, recipe.fx, config, why)
    called = ((path, model.get_submodule(path)) for path in inventory.matches)
    alike = tuple(path for path, each in called if is_linear(each) or is_activation(each))
    own = proven(Opening(alike), model, inputs).paths
    if not own:
        return inventory
    inventory = eager_inventory(opened_at(model, own), inputs, recipe.fx, config, why)
    return replace(inventory, opened=own)


def _deciding(inventory: Inventory, recipe: Recipe) -> list[Rule]:
    decisions = resolve(inventory.structure, recipe.rules).decisions.values()
    return list(dict.fromkeys(decision.rule for decision in decisions))


def _check_training(recipe: Recipe) -> None:
    """Raises ``UnsupportedError`` (QR316) if the executor that is asked for does not train."""
    if recipe.phase == "qat" and recipe.executor is not None and recipe.executor not in TRAIN:
        message = f'executor = "{recipe.executor}" does not train'
        hint = 'leave executor out, or set phase = "ptq"'
        raise UnsupportedError(Finding("QR316", message, hint=hint, key="phase"))


def _needs_graph(recipe: Recipe) -> Iterator[Finding]:
    """What in a recipe eager mode cannot do for any model."""
    if recipe.fx.roots:
        hint = "leave executor out, or remove the roots"
        yield Finding("QR316", "eager mode traces no roots", hint=hint, key="fx.roots")


def _need_values(decided: Iterable[Rule], recipe: Recipe) -> Iterator[Finding]:
    """The rules that observe tensors or quantize functions, which eager mode does not see."""
    hint = "leave executor out, or use dynamic or weight-only rules for modules"
    for rule in decided:
        if rule.qconfig and mode_of(rule.qconfig) == "static":
            message = f"eager mode has no static quantization, and {describe(rule)} is static"
            yield Finding("QR316", message, rule.location, hint=hint)
    for rule in recipe.rules:
        if rule.tier == "function" and rule.qconfig and not rule.optional:
            message = f"eager mode leaves functions float, and {describe(rule)} quantizes them"
            yield Finding("QR316", message, rule.location, hint=hint)
