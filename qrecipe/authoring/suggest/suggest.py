"""A starter recipe for a model, following the workflow that the literature recommends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from qrecipe.authoring.suggest.description import description
from qrecipe.authoring.suggest.float_rules import refusals, rules_of_float_sites
from qrecipe.authoring.suggest.subject import Scheme, Subject
from qrecipe.errors.findings import Finding, PlanError, TraceError, UnsupportedError
from qrecipe.model.call import Inputs
from qrecipe.model.graph_sites import Inventory
from qrecipe.model.proposals import traceable_parts
from qrecipe.model.quantized import quantized_part
from qrecipe.model.work import work_of, work_of_sites
from qrecipe.planning.decide import make_plan
from qrecipe.planning.inventory import inventory_of
from qrecipe.planning.plan import Plan
from qrecipe.process.neutral import neutral
from qrecipe.recipe.overlay import fitting, float_rules, merged_rules
from qrecipe.recipe.recipe import Recipe, parse_recipe
from qrecipe.recipe.schema import FLOAT
from qrecipe.recipe.toml.writer import toml_text

FEW_CONVOLUTIONS = 0.1
"""Below this share of the multiplications, convolutions are not worth a calibration."""

MANY_CONVOLUTIONS = 0.5
"""Above this share, a model without recurrent layers is a convolutional net."""

_EMBEDDINGS = ("Embedding", "EmbeddingBag")

_EMBEDDING_TABLES = {
    "tensor": {
        "embedding": {
            "observer": "per_channel_minmax",
            "dtype": "uint8",
            "qscheme": "per_channel_affine_float_qparams",
        }
    },
    "qconfig": {"embedding": {"weight": "embedding"}},
}


@neutral
def suggest(model: nn.Module, example_inputs: Any, *, num_batches: int | None = None) -> Recipe:
    """A recipe to start from: it can be planned for this model and explains itself.

    Static int8 for convolutional nets, dynamic if linear and recurrent layers dominate, both for a
    mixture; weight-only for embeddings. ``example_inputs`` are as in `qrecipe.plan`.
    ``num_batches`` is the number of calibration batches, if known: with fewer than 100, activations
    are observed by minimum and maximum, which don't depend on the order of the batches.

    Raises:
        UnsupportedError: nothing in the model has a quantized kernel, or it is quantized already
            (QR335).
        TraceError: static quantization needs a trace, and no part of the model can be traced.
        PlanError: the model cannot be quantized as it is, or does not accept the inputs.
    """
    return parse_recipe(suggestion(model, example_inputs, num_batches))


@neutral
def suggestion(model: nn.Module, example_inputs: Any, num_batches: int | None = None) -> str:
    """The TOML text of the recipe that `suggest` returns. Raises as `suggest`."""
    inputs = Inputs.from_batch(example_inputs)
    if isinstance(model, nn.Module) and (quantized := quantized_part(model)) is not None:
        hint = "suggest a recipe for the float model that it was made from"
        raise UnsupportedError(Finding("QR335", f"this model {quantized}", hint=hint))
    subject = _subject(model, inputs, num_batches)
    for scheme in _schemes(subject):
        with suppress(UnsupportedError):
            if (text := _settled(subject, scheme)) is not None:
                return text
    hint = "`qrecipe plan builtin:x86-static` shows why each operation stays float"
    message = "nothing in this model has a quantized kernel"
    raise UnsupportedError(Finding("QR335", message, hint=hint))


def _subject(model: nn.Module, inputs: Inputs, num_batches: int | None) -> Subject:
    roots: tuple[str, ...] = ()
    untraced = None
    try:
        inventory = inventory_of(model, _base("static"), inputs)
    except TraceError as error:
        share = work_of(model, inputs).convolution_share
        inventory, roots = _untraced_inventory(model, inputs, error, share)
        untraced = error.findings[0].message
    work = work_of(inventory.model, inputs)
    of_sites = work_of_sites(inventory.model, inventory, work.places)
    return Subject(inventory, work, of_sites, roots, untraced, num_batches)


def _untraced_inventory(
    model: nn.Module, inputs: Inputs, error: TraceError, convolution_share: float
) -> tuple[Inventory, tuple[str, ...]]:
    """Module by module if that is enough, else by roots, the parts that can be traced."""
    if convolution_share < FEW_CONVOLUTIONS:
        try:
            return inventory_of(model, _base("dynamic"), inputs), ()
        except PlanError:
            pass  # no such layer: the parts that can be traced may have others
    roots = tuple(traceable_parts(model, inputs))
    if not roots:
        raise error
    recipe = parse_recipe(toml_text(_with_roots(_values("static"), roots)))
    return inventory_of(model, recipe, inputs), roots


def _schemes(subject: Subject) -> Sequence[Scheme]:
    """The scheme that fits best, then the fallback if nothing can honour it."""
    share = subject.work.convolution_share
    if subject.inventory.untraced is not None:
        return ("dynamic",)
    if share < FEW_CONVOLUTIONS:
        return ("dynamic", "static")
    if share > MANY_CONVOLUTIONS and not subject.has_recurrent_layers:
        return ("static", "dynamic")
    return ("mixed", "static", "dynamic")


def _settled(subject: Subject, scheme: Scheme) -> str | None:
    """The scheme with rules that leave float what it cannot quantize.

    None, or ``UnsupportedError``, if that is everything.
    """
    values = _with_roots(_values(scheme, subject), subject.roots)
    plan, refused = _plan_and_refusals(subject.inventory, values, {})
    if not any(site.verdict == "quantized" for site in plan.sites):
        return None
    dynamic = parse_recipe(toml_text(values)).qconfigs.get("int8-dynamic")
    values = _with_rules(values, rules_of_float_sites(plan, subject.inventory, refused, dynamic))
    head = {"name": f"suggested-{scheme}", "description": description(subject, scheme, plan)}
    text, recipe = fitting(toml_text, {"format": 1, **head, **values})
    make_plan(subject.inventory, recipe)  # only suggest what can be planned
    return text


def _plan_and_refusals(
    inventory: Inventory, values: Mapping[str, Any], refused: Mapping[str, str]
) -> tuple[Plan, dict[str, str]]:
    """A plan without errors, and the sites that had to be left float for it, with reasons."""
    _, recipe = fitting(toml_text, _with_rules(values, float_rules(refused)["rules"]))
    try:
        plan = make_plan(inventory, recipe)
        more = refusals(plan, inventory, refused)
    except UnsupportedError as error:
        if error.plan is None:
            raise
        plan, more = error.plan, refusals(error.plan, inventory, refused)
        if not more:
            raise
    if not more:
        return plan, dict(refused)
    return _plan_and_refusals(inventory, values, {**refused, **more})


def _base(scheme: Scheme) -> Recipe:
    return parse_recipe(toml_text(_values(scheme)))


def _values(scheme: Scheme, subject: Subject | None = None) -> dict[str, Any]:
    """The scheme as a recipe that extends a built-in one, with rules for embeddings, if any."""
    few = subject is not None and subject.has_few_batches
    if scheme == "dynamic":
        reason = "a dynamic recipe quantizes linear and recurrent layers"
        values = _extending("x86-dynamic", {"global": {"qconfig": FLOAT, "reason": reason}})
    elif scheme == "static":
        values = _extending("x86-static-minmax" if few else "x86-static", {})
    else:
        linear = {
            "module_type": {"torch.nn.Linear": "int8-dynamic"},
            "function": {"torch.nn.functional.linear": "int8-dynamic"},
        }
        values = _with_rules(_extending("cnn-lstm", {}), linear)
        if few:
            both = [values["extends"], "builtin:x86-static-minmax"]
            values = {**values, "name": "suggested-mixed", "extends": both}
    if subject is None:
        return values
    embeddings = {f"torch.nn.{kind}": "embedding" for kind in _EMBEDDINGS if subject.has([kind])}
    if not embeddings:
        return values
    return {**_with_rules(values, {"module_type": embeddings}), **_EMBEDDING_TABLES}


def _extending(base: str, rules: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": 1, "extends": f"builtin:{base}", "rules": dict(rules)}


def _with_rules(values: Mapping[str, Any], rules: Mapping[str, Any]) -> dict[str, Any]:
    return {**values, "rules": merged_rules(values["rules"], rules)}


def _with_roots(values: dict[str, Any], roots: Sequence[str]) -> dict[str, Any]:
    return {**values, "fx": {"roots": list(roots)}} if roots else values
