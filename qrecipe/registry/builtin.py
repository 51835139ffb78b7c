"""torch's observers, fake-quants, module types and functions as recipes name them; torch-free.

Module types and functions are in `torch_names.json`, written by `tools/torch_names.py`. Tests
compare everything with the installed torch.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from qrecipe.errors.spelling import did_you_mean
from qrecipe.errors.text import shown, shown_names
from qrecipe.registry import table as registered
from qrecipe.registry.arguments import (
    KIND_TITLE,
    LEAST_FLOAT32,
    MOST_FLOAT32,
    ArgumentProblem,
    Interval,
    Kind,
    Signature,
    TypeTag,
    argument_problems,
    option_problems,
)
from qrecipe.registry.entry_points import claims, every_claim

_OBSERVER = "torch.ao.quantization.observer."
_OWN = "qrecipe.observers.activations."
_FAKE_QUANT = "torch.ao.quantization.fake_quantize."
_LEARNABLE = "torch.ao.quantization._learnable_fake_quantize."

_AVERAGING: Mapping[str, TypeTag] = {"averaging_constant": "float"}
_FRACTION = {"averaging_constant": Interval(0, 1, open_low=True)}

OBSERVERS: Mapping[str, Signature] = {
    "minmax": Signature(_OBSERVER + "MinMaxObserver"),
    "moving_average_minmax": Signature(
        _OBSERVER + "MovingAverageMinMaxObserver", _AVERAGING, limits=_FRACTION
    ),
    "per_channel_minmax": Signature(_OBSERVER + "PerChannelMinMaxObserver", per_channel=True),
    "moving_average_per_channel_minmax": Signature(
        _OBSERVER + "MovingAveragePerChannelMinMaxObserver",
        _AVERAGING,
        limits=_FRACTION,
        per_channel=True,
    ),
    # fewer than 16 bins silently give wrong ranges, more than 2**14 take minutes
    "histogram": Signature(
        _OBSERVER + "HistogramObserver", {"bins": "int"}, limits={"bins": Interval(16, 2**14)}
    ),
    "mean_minmax": Signature(_OWN + "MeanMinMaxObserver"),
    "mse": Signature(_OWN + "MSEObserver"),
    "fixed_qparams": Signature(
        _OBSERVER + "FixedQParamsObserver",
        {"scale": "float", "zero_point": "int"},
        required=frozenset({"scale", "zero_point"}),
        limits={"scale": Interval(LEAST_FLOAT32, MOST_FLOAT32)},
    ),
    "placeholder": Signature(_OBSERVER + "PlaceholderObserver"),
}
"""Observers by their names in recipes: torch's, and two of our own."""

FAKE_QUANTS: Mapping[str, Signature] = {
    "fake_quantize": Signature(_FAKE_QUANT + "FakeQuantize"),
    "fused_moving_average": Signature(
        _FAKE_QUANT + "FusedMovingAvgObsFakeQuantize",
        observers=frozenset({"moving_average_minmax", "moving_average_per_channel_minmax"}),
    ),
    "learnable": Signature(
        _LEARNABLE + "_LearnableFakeQuantize",
        {"use_grad_scaling": "bool"},
        observers=frozenset(
            {
                *("minmax", "moving_average_minmax", "histogram"),
                *("per_channel_minmax", "moving_average_per_channel_minmax"),
            }
        ),
    ),
    "fixed_qparams": Signature(
        _FAKE_QUANT + "FixedQParamsFakeQuantize", observers=frozenset({"fixed_qparams"})
    ),
}
"""torch's fake-quants by their names in recipes."""

TRANSFORMS: Mapping[str, Signature] = {
    "equalize": Signature("qrecipe.transforms.equalize.Equalize", {"by": "str", "chains": "any"}),
    "smooth": Signature("qrecipe.transforms.smooth.Smooth", {"alpha": "any", "groups": "any"}),
}
"""Our transforms by their names in recipes, in the order in which they change a model."""

BUILTIN: Mapping[Kind, Mapping[str, Signature]] = {
    "observer": OBSERVERS,
    "fake_quant": FAKE_QUANTS,
    "transform": TRANSFORMS,
}
"""What has a name without being registered."""


def signature(kind: Kind, name: str) -> Signature | None:
    """The signature of what is built in or registered; None if unknown."""
    if name in BUILTIN[kind]:
        return BUILTIN[kind][name]
    registration = registered.find(kind, name)
    return None if registration is None else registration.signature


def known_names(kind: Kind) -> tuple[str, ...]:
    """The built-in, registered and claimed names of one kind."""
    claimed = {claim.name for claim in every_claim() if claim.kind == kind}
    installed = {*registered.names(kind), *claimed} - BUILTIN[kind].keys()
    return (*BUILTIN[kind], *sorted(installed))


def check_arguments(
    kind: Kind, name: str, arguments: Mapping[str, object]
) -> list[ArgumentProblem]:
    """All problems of ``{ name = ..., **arguments }`` in a recipe.

    QR104 is an unknown ``name``, QR105 an unknown argument, QR106 a missing or invalid value. The
    arguments of an installed plugin that is not imported yet are checked by the plan, which
    imports it.
    """
    found = signature(kind, name)
    title = f"{KIND_TITLE[kind]} {shown(name)}"
    if found is None:
        return [] if claims(kind, name) else [unknown_name(kind, name)]
    problems = list(argument_problems(title, found, arguments))
    registration = registered.find(kind, name)
    if problems or registration is None or registration.options is None:
        return problems
    return list(option_problems(title, registration.options, arguments))


def unknown_name(kind: Kind, name: str) -> ArgumentProblem:
    """The problem of a name that is neither torch's nor registered (QR104)."""
    title = f"{KIND_TITLE[kind]} {shown(name)}"
    if claimed := claims(kind, name):
        hint = f"plan a recipe that uses it, or import {shown(claimed[0].module)}"
        return ArgumentProblem("QR104", None, f"{title} of {claimed[0]} is not loaded", hint)
    known = known_names(kind)
    hint = (
        _by_class(kind, name) or did_you_mean(name, known) or f"known: {shown_names(sorted(known))}"
    )
    return ArgumentProblem("QR104", None, f"unknown {title}", hint)


def _by_class(kind: Kind, name: str) -> str | None:
    """A hint for a name written as its class, such as ``observer.MinMaxObserver``."""
    wanted = _plain(name)
    for of in sorted(BUILTIN, key=lambda each: each != kind):  # those of the kind first
        for known, found in BUILTIN[of].items():
            if wanted in (_plain(known), _plain(found.target)):
                if of == kind:
                    return f"did you mean {shown(known)}?"
                return _MEANT[of].format(shown(known))
    return None


_MEANT: Mapping[Kind, str] = {
    "observer": "it belongs to the key observer: write observer = {}",
    "fake_quant": "it belongs to the key fake_quant: write fake_quant = {}",
    "transform": "it is a transform, with the table [transform.{}]",
}


def _plain(name: str) -> str:
    """The common form of a class and a recipe name: ``MinMaxObserver`` gives ``minmax``."""
    last = name.rpartition(".")[2].replace("_", "").lower()
    return last.removesuffix("observer") or last


@cache
def _torch_names() -> dict[str, Any]:
    path = Path(__file__).with_name("torch_names.json")
    names: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return names


def _family(last: str) -> str:
    stripped = last.strip("_")
    merged: str = _torch_names()["families"].get(stripped, stripped)
    return merged


@cache
def _functions() -> dict[str, frozenset[str]]:
    """Function names by namespace; "" has all of them and the names of the families."""
    by_namespace = {key: frozenset(names) for key, names in _torch_names()["functions"].items()}
    every = frozenset[str]().union(*by_namespace.values())
    bare = every | {name.strip("_") for name in every} | {_family(name) for name in every}
    return {**by_namespace, "": bare}


def module_types() -> Collection[str]:
    """The public dotted names of torch's module types."""
    names: Mapping[str, str] = _torch_names()["module_types"]
    return names.keys()


@cache
def function_families() -> Collection[str]:
    """The families of torch's and Python's functions on tensors."""
    return dict.fromkeys(_family(name) for name in sorted(_functions()[""])).keys()


PARAMETRIZED = "torch.nn.utils.parametrize.Parametrized"
"""The prefix of the classes that torch creates for modules with parametrizations."""

_INSIDE_ATTENTION = "torch.nn.modules.linear.NonDynamicallyQuantizableLinear"


def is_module_type(name: str) -> bool:
    """Whether ``name`` is the public or internal dotted name of a torch module type."""
    return (
        name in module_types()
        or name in _internal_module_types()
        or name.startswith(PARAMETRIZED)
        or name == _INSIDE_ATTENTION
    )


def canonical_module_type(name: str) -> str:
    """The internal dotted name of a module type; an unknown name is returned unchanged.

    >>> canonical_module_type("torch.nn.Conv2d")
    'torch.nn.modules.conv.Conv2d'
    """
    internal: str = _torch_names()["module_types"].get(name, name)
    return internal


@cache
def _internal_module_types() -> frozenset[str]:
    return frozenset(_torch_names()["module_types"].values())


def function_family(name: str) -> str | None:
    """The family of a function: its last name without in-place marks, aliases merged.

    Accepts "torch.add", "torch.nn.functional.relu", "Tensor.add_", "torch.Tensor.add",
    "operator.iadd" and bare "add"; None if neither torch nor operator has such a function.

    >>> function_family("operator.itruediv")
    'div'
    """
    namespace, _, last = name.rpartition(".")
    namespace = {"Tensor": "torch.Tensor"}.get(namespace, namespace)
    return _family(last) if last in _functions().get(namespace, ()) else None
