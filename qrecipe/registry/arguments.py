"""The arguments of what has a name in recipes, and how a recipe's are checked; torch-free."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from qrecipe.errors.spelling import did_you_mean, nearest
from qrecipe.errors.text import first_line, one_line, shown, shown_names

Kind = Literal["observer", "fake_quant", "transform"]
TypeTag = Literal["int", "float", "bool", "str", "number_list", "any"]

KIND_TITLE: dict[Kind, str] = {
    "observer": "observer",
    "fake_quant": "fake-quant",
    "transform": "transform",
}

SPEC_ARGUMENTS = frozenset(
    {
        *("dtype", "qscheme", "quant_min", "quant_max", "eps"),
        *("reduce_range", "is_dynamic", "ch_axis", "factory_kwargs"),
    }
)
"""Constructor arguments that come from the tensor spec or the operation, never from the recipe's
arguments."""

_PROVIDED = {
    "ch_axis": "the channel axis comes from the operation",
    "factory_kwargs": "the device comes from the module",
}

_EXPECTED: dict[TypeTag, str] = {
    "int": "an integer",
    "float": "a finite number",
    "bool": "true or false",
    "str": "a string",
    "number_list": "a list of finite numbers",
    "any": "a number, string, boolean or list",
}


@dataclass(frozen=True, slots=True)
class Interval:
    """The allowed numbers from ``low`` to ``high``, both included unless open."""

    low: float
    high: float = math.inf
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and value <= self.high

    def __str__(self) -> str:
        lower = f"greater than {self.low:g}" if self.open_low else f"at least {self.low:g}"
        return lower if self.high == math.inf else f"{lower} and at most {self.high:g}"


@dataclass(frozen=True, slots=True)
class Signature:
    """How a recipe may call an observer, fake-quant or transform.

    ``target`` is the dotted name of the class, ``parameters`` maps argument names to type tags,
    ``required`` are those without a default, and ``limits`` the allowed values.
    """

    target: str
    parameters: Mapping[str, TypeTag] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    limits: Mapping[str, Interval] = field(default_factory=dict)
    per_channel: bool = False
    observers: frozenset[str] | None = None
    """For a fake-quant: the names of the observers that it can wrap; None for all."""


@dataclass(frozen=True, slots=True)
class ArgumentProblem:
    """One problem of a constructor table; ``argument`` is None if the problem is its name."""

    code: str
    argument: str | None
    message: str
    hint: str | None = None


def argument_problems(
    title: str, signature: Signature, arguments: Mapping[str, object]
) -> Iterator[ArgumentProblem]:
    """The problems of ``arguments`` for ``signature``; messages call it ``title``."""
    known, meant = signature.parameters, set[str]()
    for name, value in arguments.items():
        if name not in known:
            meant.update(nearest(name, known))  # not to be reported as missing too
            message = f"{title} has no argument {shown(name)}"
            yield ArgumentProblem("QR105", name, message, _unknown_hint(name, known))
        elif not _fits(value, known[name], signature.limits.get(name)):
            message = f"argument {shown(name)} of {title} cannot be {shown(value)}"
            yield ArgumentProblem("QR106", name, message, _expected(signature, name))
    for name in sorted(signature.required - meant - arguments.keys()):
        message = f"{title} needs the argument {shown(name)}"
        yield ArgumentProblem("QR106", name, message, _expected(signature, name))


def option_problems(
    title: str, options: type[BaseModel], arguments: Mapping[str, Any]
) -> Iterator[ArgumentProblem]:
    """The problems of ``arguments`` according to the plugin's Pydantic model."""
    try:
        options(**arguments)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            name = str(detail["loc"][0]) if detail["loc"] else None
            subject = title if name is None else f"argument {shown(name)} of {title}"
            code = "QR105" if detail["type"] == "extra_forbidden" else "QR106"
            yield ArgumentProblem(code, name, f"{subject}: {one_line(detail['msg'])[:200]}")
    except (Exception, SystemExit) as error:  # from the plugin's own validator
        said = one_line(first_line(error))[:200]
        yield ArgumentProblem("QR106", None, f"the options of {title} fail: {said}")


def _unknown_hint(name: str, known: Collection[str]) -> str:
    if name in _PROVIDED:
        return _PROVIDED[name]
    if name in SPEC_ARGUMENTS:
        return f'write "{name}" as a key of the tensor, next to "observer"'
    takes = f"it takes {shown_names(sorted(known))}" if known else "it takes no arguments"
    return did_you_mean(name, known) or takes


def _expected(signature: Signature, name: str) -> str:
    limit = signature.limits.get(name)
    kind = _EXPECTED[signature.parameters[name]]
    return f"expected {kind}" if limit is None else f"expected {kind} {limit}"


def _fits(value: object, tag: TypeTag, limit: Interval | None) -> bool:
    is_within = limit is None or (isinstance(value, (int, float)) and value in limit)
    return is_within and _has_type(value, tag)


def _has_type(value: object, tag: TypeTag) -> bool:
    if tag == "any":
        return isinstance(value, (bool, int, float, str, list, tuple))
    if tag == "number_list":
        return isinstance(value, (list, tuple)) and all(_has_type(v, "float") for v in value)
    if tag == "bool" or isinstance(value, bool):
        return tag == "bool" and isinstance(value, bool)
    if tag == "str":
        return isinstance(value, str)
    if tag == "int":
        return isinstance(value, int)
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


LEAST_FLOAT32 = 2.0**-126
MOST_FLOAT32 = 2.0**128 - 2.0**104
"""The range of normal positive float32 numbers; torch stores scales as float32."""
