"""A plan as plain values, and read back from them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from qrecipe.errors.findings import CODES, Finding, PlanError
from qrecipe.errors.text import first_problem, one_line
from qrecipe.recipe.recipe import Ingredient, WrittenRule
from qrecipe.recipe.schema import TensorSpec

if TYPE_CHECKING:
    from qrecipe.planning.plan import Plan, Site

_AS_THEY_ARE = (
    *("boundaries", "recipe", "fingerprint", "backend", "phase", "executor", "executor_reason"),
    *("needs_vnni", "chains", "groups", "steps"),
)
"""Fields of a plan that are read back as they are written."""

_NOT_WRITTEN = ("structure", "saturating")
_LONGEST_REASON = 200

_LARGEST_EXPONENT = 126
"""The largest power of two whose inverse is a normal float32."""


def plan_values(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; recipes are named as their author named them."""
    written = [each.name for each in fields(plan) if each.name not in _NOT_WRITTEN]
    values = {name: _plain(getattr(plan, name)) for name in written}
    rules = [{**each.pop("rule"), **each} for each in values["rules"]]
    return {**values, "rules": rules, "is_for_export": plan.is_for_export}


def site_values(site: Site) -> dict[str, Any]:
    """A site as plain values."""
    values: dict[str, Any] = _plain(site)
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(map(_plain, value))
    if isinstance(value, TensorSpec):
        return spec_values(value)
    if isinstance(value, (Finding, Ingredient)):
        return value.to_json()
    if isinstance(value, WrittenRule):
        own = {"tier": value.tier, "key": value.key, "says": value.label, "reason": value.reason}
        return {**own, "location": str(value.location)}
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    return value


def spec_values(spec: TensorSpec) -> dict[str, Any]:
    """The keys of a tensor spec that are set, as plain values."""
    values: dict[str, Any] = spec.model_dump(exclude_none=True)
    for key in ("observer", "fake_quant"):
        constructor = getattr(spec, key)
        if constructor is not None:
            name, arguments = constructor.name, constructor.arguments
            values[key] = {"name": name, **arguments} if arguments else name
    return values


def plan_of_json(adapter: TypeAdapter[Plan], text: str) -> Plan:
    """The plan in a text that may be somebody else's. Raises PlanError (QR315)."""
    try:
        values = _completed(json.loads(text))
        # as JSON, so that arrays are read as tuples and nothing else is converted
        plan = adapter.validate_json(json.dumps(_fields(values)), strict=True)
        problem = next(_contradictions(plan, values), None)
    except ValidationError as error:
        problem = first_problem(error)
    except KeyError as error:
        problem = f"the key {error} is missing"
    except (AttributeError, TypeError):
        problem = "a value has the wrong type: expected an object or an array"
    except (ValueError, RecursionError) as error:
        problem = str(error)
    if problem is None:
        return plan
    raise _not_a_plan(problem)


def text_of_values(values: Mapping[str, Any]) -> str:
    """Plain values as JSON. Raises PlanError (QR315) for anything else."""
    try:
        return json.dumps(dict(values), default=_as_dict)
    except (TypeError, ValueError, RecursionError) as error:
        raise _not_a_plan(str(error)) from None


def _as_dict(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} is not a plain value")


def _not_a_plan(problem: str) -> PlanError:
    message = f"this is not a plan as Plan.to_json writes it: {one_line(problem)[:_LONGEST_REASON]}"
    return PlanError.of("QR315", message, hint="make the plan again with qrecipe.plan")


def _contradictions(plan: Plan, values: Any) -> Iterator[str]:
    """What is wrong with a plan whose single values are valid."""
    if len({site.name for site in plan}) != len(plan):
        yield "it has a site twice"
    for site in plan:
        if (site.verdict == "float") != (site.mode is None):
            yield f"verdict and mode of {site.name} differ"
        if site.verdict == "quantized" and site.qconfig is None:
            yield f"{site.name} is quantized without a qconfig"
    if plan.boundaries < 0:
        yield "boundaries is negative"
    yield from _wrong_scales(plan)
    yield from (
        f"there is no code {finding.code}"
        for finding in (*plan.findings, *plan.warnings)
        if finding.code not in CODES
    )
    if values["is_for_export"] is not plan.is_for_export:
        yield f"is_for_export does not match the backend {plan.backend}"
    written = json.loads(json.dumps(plan_values(plan)))
    yield from (
        f"{key} has keys or values that are not written there"
        for key in {**written, **values}
        if written.get(key) != values.get(key)
    )


def _wrong_scales(plan: Plan) -> Iterator[str]:
    """What is wrong with the transforms of a plan."""
    for chain in plan.chains:
        if len(chain.exponents) not in (0, len(chain.sites) - 1):
            yield f"a chain of {len(chain.sites)} sites has {len(chain.exponents)} exponents"
    for group in plan.groups:
        if group.alpha is not None and not 0 <= group.alpha <= 1:
            yield f"alpha is {group.alpha}"
    for step in plan.steps:
        if not 0 <= step.tolerance <= 1:
            yield f"the tolerance of {step.name} is {step.tolerance}"
    given = {site.name for site in plan}
    named = {
        *(name for chain in plan.chains for name in chain.sites),
        *(name for group in plan.groups for name in group.sites),
        *(group.at for group in plan.groups if group.at is not None),
    }
    yield from (f"it scales {name}, which is not a site" for name in sorted(named - given))
    members = Counter(name for group in plan.groups for name in group.sites)
    yield from (f"{name} is in a group twice" for name, count in members.items() if count > 1)
    scales = [
        *(joint for chain in plan.chains for joint in chain.exponents),
        *(group.exponents for group in plan.groups),
    ]
    if any(abs(power) > _LARGEST_EXPONENT for powers in scales for power in powers):
        yield "it scales by more than a float holds"


def _completed(values: Any) -> Any:
    """The values with what older plans lack."""
    absent: dict[str, Any] = {"executor_reason": None, "chains": [], "groups": [], "steps": []}
    of_site: dict[str, Any] = {"clamp": None, "reads": [], "is_output": False}
    sites = [{**of_site, **site} for site in _items(values, "sites")]
    values = {**absent, **values, "sites": sites}
    anywhere = [site["name"] for site in sites]
    return {**values, "steps": [{"moved": anywhere, **step} for step in _items(values, "steps")]}


def _fields(values: Any) -> dict[str, Any]:
    """The values with the names and the nesting of the fields that they belong to."""
    return {
        **{name: values[name] for name in _AS_THEY_ARE},
        "ingredients": [_ingredient_fields(each) for each in _items(values, "ingredients")],
        "sites": [
            {
                **site,
                "rule": _rule_fields(site["rule"]),
                "shadowed": [_rule_fields(rule) for rule in _items(site, "shadowed")],
            }
            for site in _items(values, "sites")
        ],
        "rules": [
            {"rule": _rule_fields(each), "verdict": each["verdict"], "sites": each["sites"]}
            for each in _items(values, "rules")
        ],
        "warnings": [_finding_fields(each) for each in _items(values, "warnings")],
        "findings": [_finding_fields(each) for each in _items(values, "findings")],
    }


def _items(values: Any, name: str) -> list[Any]:
    found = values[name]
    if not isinstance(found, list):
        raise TypeError
    return found


def _rule_fields(values: Any) -> dict[str, Any]:
    file, line, column = values["location"].rsplit(":", 2)
    location = {"file": file, "line": int(line), "column": int(column), "end_column": int(column)}
    own = {name: values[name] for name in ("tier", "key", "reason")}
    return {**own, "label": values["says"], "location": location}


def _ingredient_fields(values: Any) -> dict[str, Any]:
    name, version = values["distribution"], values["version"]
    publisher = None if name is None and version is None else {"name": name, "version": version}
    return {"name": values["name"], "fingerprint": values["fingerprint"], "publisher": publisher}


def _finding_fields(values: Any) -> dict[str, Any]:
    related = [[each["text"], each] for each in _items(values, "related")]
    return {**values, "related": related, "key": None}
