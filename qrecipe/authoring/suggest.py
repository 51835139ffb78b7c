"""A starter recipe for a model, by the workflow that the literature recommends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from qrecipe.authoring.suggest_float import float_rules, refusals
from qrecipe.authoring.suggest_work import Work, work_of
from qrecipe.errors import Finding, PlanError, TraceError, UnsupportedError
from qrecipe.inputs import Inputs
from qrecipe.inventory import Inventory
from qrecipe.pipeline import inventory_of
from qrecipe.planning import Plan, make_plan
from qrecipe.recipe import Recipe, parse_recipe
from qrecipe.schema import FLOAT
from qrecipe.tracing import traceable_parts
from qrecipe.writing import toml_text

Scheme = Literal["static", "dynamic", "mixed"]

FEW_CONVOLUTIONS = 0.1
"""Below this share of the multiplications convolutions are not worth calibrating a model for."""

MANY_CONVOLUTIONS = 0.5
"""Above this share a model without recurrent layers is a convolutional net."""

ROBUST_SIZE = 10_000_000
"""Models with more parameters lose less to quantization, as a rule of thumb."""

_DYNAMIC_TYPES = ("Linear", "LSTM", "GRU", "LSTMCell", "GRUCell", "RNNCell")
_RECURRENT = _DYNAMIC_TYPES[1:]
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


def suggest(model: nn.Module, example_inputs: Any) -> Recipe:
    """A recipe to start from: it plans for this model, and says why it is as it is.

    Static int8 for convolutional nets, dynamic where linear and recurrent layers dominate, both
    where both stand; embeddings by their weights alone. ``example_inputs`` are as in
    `qrecipe.plan`.

    Raises:
        UnsupportedError: nothing in the model has a quantized kernel (QR335).
        TraceError: static quantization needs a trace, and no part of the model can be traced.
        PlanError: the model cannot be quantized as it is, or not take the inputs.
    """
    return parse_recipe(suggestion(model, example_inputs))


def suggestion(model: nn.Module, example_inputs: Any) -> str:
    """The text of the recipe that `suggest` gives, extending a built-in one.

    Raises as `suggest`.
    """
    inputs = Inputs.from_batch(example_inputs)
    subject = _subject(model, inputs)
    return _first_possible(subject, _schemes(subject))


def _first_possible(subject: _Subject, schemes: Sequence[Scheme]) -> str:
    try:
        return _settled(subject, schemes[0])
    except UnsupportedError as error:
        if len(schemes) == 1:
            raise _nothing() from error
    return _first_possible(subject, schemes[1:])


@dataclass(frozen=True, slots=True)
class _Subject:
    """A model as its sites, what it computes with, and the roots where only those can be traced.

    ``untraced`` says why the model is taken module by module.
    """

    inventory: Inventory
    work: Work
    roots: tuple[str, ...] = ()
    untraced: str | None = None

    @property
    def has_recurrent_layers(self) -> bool:
        return any(_is_of(op, _RECURRENT) for op in self.ops)

    @property
    def ops(self) -> Iterator[str]:
        return (operation.op for operation in self.inventory.structure.operations)


def _subject(model: nn.Module, inputs: Inputs) -> _Subject:
    try:
        inventory = inventory_of(model, parse_recipe(_base("static")), inputs)
    except TraceError as error:
        return _untraceable(model, inputs, error)
    return _Subject(inventory, work_of(model, inputs))


def _untraceable(model: nn.Module, inputs: Inputs, error: TraceError) -> _Subject:
    """Module by module where that is enough, else by the parts that can be traced."""
    work = work_of(model, inputs)
    line = error.findings[0].message
    if work.convolution_share < FEW_CONVOLUTIONS:
        try:
            inventory = inventory_of(model, parse_recipe(_base("dynamic")), inputs)
            return _Subject(inventory, work, untraced=line)
        except PlanError:
            pass  # no such layer: what can be traced may have others
    roots = tuple(traceable_parts(model, inputs))
    if not roots:
        raise error
    recipe = parse_recipe(toml_text({**_values("static"), "fx": {"roots": list(roots)}}))
    return _Subject(inventory_of(model, recipe, inputs), work, roots, line)


def _schemes(subject: _Subject) -> Sequence[Scheme]:
    """The scheme that fits, then what is left where it can be honoured nowhere."""
    share = subject.work.convolution_share
    if subject.inventory.untraced is not None:
        return ("dynamic",)
    if share < FEW_CONVOLUTIONS:
        return ("dynamic", "static")
    if share > MANY_CONVOLUTIONS and not subject.has_recurrent_layers:
        return ("static", "dynamic")
    return ("mixed", "static", "dynamic")


def _settled(subject: _Subject, scheme: Scheme) -> str:
    """The scheme with a rule that leaves float whatever its own rules cannot have.

    Raises ``UnsupportedError`` where that is everything.
    """
    values = _with_roots(_values(scheme, tuple(subject.ops)), subject.roots)
    plan, refused = _planned(subject.inventory, values, {})
    if not any(site.verdict == "quantized" for site in plan.sites):
        raise _nothing()
    dynamic = parse_recipe(toml_text(values)).qconfigs.get("int8-dynamic")
    values = _with_rules(values, float_rules(plan, subject.inventory, refused, dynamic))
    described = {"description": _description(subject, scheme, plan)}
    text = toml_text({"format": 1, "name": _name(scheme), **described, **values})
    make_plan(subject.inventory, parse_recipe(text))  # what is suggested has been planned
    return text


def _planned(
    inventory: Inventory, values: Mapping[str, Any], refused: Mapping[str, str]
) -> tuple[Plan, dict[str, str]]:
    """The plan without a finding, and the sites that had to be left float for it, with reasons."""
    recipe = parse_recipe(toml_text(_with_rules(values, {"module_name": _floats(refused)})))
    try:
        plan = make_plan(inventory, recipe)
        more = refusals(plan, inventory, refused)
    except UnsupportedError as error:
        if error.plan is None:
            raise
        plan, more = error.plan, refusals(error.plan, inventory, refused)
        if not more:
            raise
    return (plan, dict(refused)) if not more else _planned(inventory, values, {**refused, **more})


def _floats(reasons: Mapping[str, str]) -> dict[str, Any]:
    return {key: {"qconfig": FLOAT, "reason": reason} for key, reason in reasons.items()}


def _name(scheme: Scheme) -> str:
    return f"suggested-{scheme}"


def _base(scheme: Scheme) -> str:
    return toml_text(_values(scheme))


def _values(scheme: Scheme, ops: Sequence[str] = ()) -> dict[str, Any]:
    """The scheme as a recipe that extends a built-in one, for a model with these operations."""
    if scheme == "dynamic":
        reason = "a dynamic recipe quantizes linear and recurrent layers"
        values = _extending("x86-dynamic", {"global": {"qconfig": FLOAT, "reason": reason}})
    elif scheme == "static":
        values = _extending("x86-static", {})
    else:
        linear = {
            "module_type": {"torch.nn.Linear": "int8-dynamic"},
            "function": {"torch.nn.functional.linear": "int8-dynamic"},
        }
        values = _with_rules(_extending("cnn-lstm", {}), linear)
    embeddings = {
        f"torch.nn.{kind}": "embedding"
        for kind in _EMBEDDINGS
        if any(_is_of(op, [kind]) for op in ops)
    }
    if not embeddings:
        return values
    return {**_with_rules(values, {"module_type": embeddings}), **_EMBEDDING_TABLES}


def _extending(base: str, rules: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": 1, "extends": f"builtin:{base}", "rules": dict(rules)}


def _with_rules(values: Mapping[str, Any], rules: Mapping[str, Any]) -> dict[str, Any]:
    tiers = dict(values["rules"])
    for tier, new in rules.items():
        tiers[tier] = {**tiers.get(tier, {}), **new}
    tabled = {
        tier: found if tier == "global" else {key: _table(rule) for key, rule in found.items()}
        for tier, found in tiers.items()
    }
    return {**values, "rules": tabled}


def _table(rule: Any) -> Any:
    return {"qconfig": rule} if isinstance(rule, str) else rule


def _with_roots(values: dict[str, Any], roots: Sequence[str]) -> dict[str, Any]:
    return {**values, "fx": {"roots": list(roots)}} if roots else values


def _is_of(op: str, kinds: Sequence[str]) -> bool:
    return op.partition("+")[0] in kinds


def _description(subject: _Subject, scheme: Scheme, plan: Plan) -> str:
    """Why this scheme, in sentences of one line each."""
    return "\n".join([*_why(subject, scheme), *_coverage(plan), *_size(subject.work)]) + "\n"


def _why(subject: _Subject, scheme: Scheme) -> Iterator[str]:
    share = f"{subject.work.convolution_share:.0%}"
    if scheme == "dynamic":
        yield (
            "Dynamic int8: linear and recurrent layers are "
            f"{1 - subject.work.convolution_share:.0%} of the multiplications with weights."
        )
        yield "Ranges are found at run time, so that no calibration is needed."
    elif scheme == "static":
        yield f"Static int8: convolutions are {share} of the multiplications with weights."
    else:
        yield (
            f"Mixed: convolutions ({share} of the multiplications with weights) and what is around "
            "them static, linear and recurrent layers dynamic."
        )
    if scheme != "dynamic":
        yield "Weights by the range of each channel, activations by a moving average of theirs."
        yield "Calibrate with about 100 representative mini-batches."
    if subject.untraced is not None:
        yield (
            "The model cannot be traced as a whole: what is outside the roots stays float."
            if subject.roots
            else "The model cannot be traced: modules are swapped one by one, functions stay float."
        )


def _coverage(plan: Plan) -> Iterator[str]:
    count = sum(site.verdict == "quantized" for site in plan.sites)
    left = sum(site.verdict == "float" for site in plan.sites)
    yield f"Of {len(plan.sites)} operations {count} are quantized and {left} left float."


def _size(work: Work) -> Iterator[str]:
    rule = f"As a rule of thumb models above {ROBUST_SIZE // 10**6} million parameters are more"
    yield f"{rule} robust to quantization; this one has {work.parameters:,}."


def _nothing() -> UnsupportedError:
    return UnsupportedError(
        Finding(
            "QR335",
            "nothing in this model has a quantized kernel",
            hint="`qrecipe plan builtin:x86-static` says of each operation why it stays float",
        )
    )
