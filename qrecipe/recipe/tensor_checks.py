"""Whether a tensor spec is sound, and fit for what it is used for.

torch finds out when a model is prepared, or never: some pairs train one thing and convert another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qrecipe.errors.findings import Finding
from qrecipe.errors.text import shown, shown_names
from qrecipe.recipe.extends import Composition
from qrecipe.recipe.layers import SettingPath
from qrecipe.recipe.schema import QUANTIZED_RANGE, Constructor, TensorSpec, quantized_range
from qrecipe.recipe.toml.positions import KeyPath
from qrecipe.recipe.validation import dotted
from qrecipe.registry.arguments import Kind
from qrecipe.registry.builtin import FAKE_QUANTS, OBSERVERS, check_arguments

_UNSIGNED = frozenset({"uint8", "uint4"})
_FLOAT_QPARAMS = "per_channel_affine_float_qparams"
_PLACEHOLDER = "placeholder"
_CONSTRUCTED: tuple[Kind, ...] = ("observer", "fake_quant")
_OBSERVER, _FAKE_QUANT = ("observer", "name"), ("fake_quant", "name")


def tensor_findings(recipe: Composition, name: str, spec: TensorSpec) -> Iterator[Finding]:
    """The problems of ``[tensor.NAME]``, whatever it is used for."""
    path = ("tensor", name)
    for kind in _CONSTRUCTED:
        made: Constructor | None = getattr(spec, kind)
        if made is not None:
            yield from argument_findings(recipe, kind, made.name, made.arguments, (*path, kind))
    if not recipe.is_sound(*path, "is_dynamic"):  # the rest depends on it
        return
    for missing in missing_keys(spec):
        if recipe.is_sound(*path, missing.key):
            owner = f'"{missing.beside}"' if missing.beside else dotted(path)
            message = f'{owner} needs "{missing.key}"{" as well" if missing.beside else ""}'
            at = (*path, *filter(None, [missing.beside]))
            yield recipe.about_key("QR103", message, at, missing.hint)
    for problem in contradictions(spec):
        about = recipe.about_key if problem.is_surplus else recipe.about_value
        finding = about("QR109", problem.message, (*path, *problem.at), problem.hint)
        yield _related(recipe, finding, (*path, *problem.cause)) if problem.cause else finding


def use_findings(
    recipe: Composition, use: KeyPath, role: str, name: str, spec: TensorSpec
) -> Iterator[Finding]:
    """Why a tensor spec cannot be a weight or an activation; ``use`` is the path that names it."""
    for key, what, hint in _misuses(role, spec):
        finding = recipe.about_value("QR109", f"{shown(name)} {what}", use, hint)
        yield _related(recipe, finding, ("tensor", name, key))


def _misuses(role: str, spec: TensorSpec) -> Iterator[tuple[str, str, str]]:
    """The keys that do not fit a role: what is wrong, and a hint."""
    if role == "activation":
        if is_static_integer(spec) and is_per_channel(spec):
            key = "observer" if spec.qscheme is None else "qscheme"
            what = "is per channel, which no kernel supports for activations"
            yield key, what, "use a per-tensor observer and qscheme"
        return
    if spec.reduce_range and is_static_integer(spec):
        what = "has reduce_range, which is for activations only"
        yield "reduce_range", what, "use a tensor without reduce_range"
    if spec.inputs_only:
        what = "has inputs_only, which is for activations only"
        yield "inputs_only", what, "use a tensor without inputs_only"
    if spec.is_dynamic and spec.dtype in ("int8", "uint8"):
        what = "is dynamic, which a weight cannot be"
        yield "is_dynamic", what, "only activations have ranges that change at run time"


def _related(recipe: Composition, finding: Finding, cause: KeyPath) -> Finding:
    return replace(finding, related=(("set at", recipe.owner(cause).key(cause)),))


def argument_findings(
    recipe: Composition, kind: Kind, name: str, arguments: dict[str, Any], owner: SettingPath
) -> Iterator[Finding]:
    """An unknown name of a plugin (QR104), or wrong arguments (QR105, QR106) in its table."""
    named = owner if kind == "transform" else (*owner, "name")
    for problem in check_arguments(kind, name, arguments):
        at = named if problem.argument is None else (*owner, problem.argument)
        if recipe.is_sound(*at):
            is_key = at == owner or problem.code == "QR105"
            about = recipe.about_key if is_key else recipe.about_value
            yield about(problem.code, problem.message, at, problem.hint)


@dataclass(frozen=True, slots=True)
class Missing:
    """A key that a spec needs; ``beside`` is the key that requires it, None for the spec."""

    key: str
    hint: str
    beside: str | None = None


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Settings that cannot be combined.

    ``at`` is the path of the setting at fault: its key if it ``is_surplus``, otherwise its value;
    ``cause`` is the path of the setting that it contradicts.
    """

    at: tuple[str, ...]
    message: str
    hint: str | None = None
    is_surplus: bool = False
    cause: tuple[str, ...] | None = None


def missing_keys(spec: TensorSpec) -> Iterator[Missing]:
    """The keys that a spec lacks; nothing is left to torch's defaults, which no plan shows."""
    if spec.dtype is None:
        yield Missing("dtype", 'for example dtype = "int8"')
    if is_static_integer(spec):
        if spec.observer is None:
            yield Missing("observer", 'for example observer = "minmax"')
        if spec.qscheme is None and (spec.observer is None or _observes(spec)):
            yield Missing("qscheme", f"for example qscheme = {shown(_usual_qscheme(spec))}")
        for key, other in (("quant_min", "quant_max"), ("quant_max", "quant_min")):
            if getattr(spec, key) is None and getattr(spec, other) is not None:
                yield Missing(key, "set both ends of the range", beside=other)


def contradictions(spec: TensorSpec) -> Iterator[Contradiction]:
    """The contradictions within one tensor spec, whatever it is used for."""
    if spec.dtype in ("float16", "float32"):
        yield from _of_float(spec)
    elif spec.dtype is not None and spec.is_dynamic:
        yield from _of_dynamic(spec)
    elif spec.dtype is not None:
        if spec.observer is not None and not _observes(spec):
            message = f"a placeholder observes nothing, and {spec.dtype} needs a range"
            yield Contradiction(_OBSERVER, message, "use it for is_dynamic, float16 or float32")
        yield from _of_qscheme(spec)
        yield from _of_range(spec)
        yield from _of_fixed(spec)
        yield from _of_fake_quant(spec)


def is_static_integer(spec: TensorSpec) -> bool:
    """Whether the spec has an observed, static range."""
    return spec.dtype in QUANTIZED_RANGE and not spec.is_dynamic


def is_per_channel(spec: TensorSpec) -> bool:
    """Whether every channel gets its own scale; False if the spec contradicts itself."""
    told = {_observes_channels(spec), _scales_channels(spec)} - {None}
    return told == {True}


def _of_float(spec: TensorSpec) -> Iterator[Contradiction]:
    """float16 and float32 tensors are neither scaled nor observed."""
    for key in _written(spec, {"dtype", "is_dynamic", "observer"}):
        message = f'a {spec.dtype} tensor is not scaled and takes no "{key}"'
        yield Contradiction((key,), message, "remove it", is_surplus=True)
    if spec.dtype == "float32" and spec.is_dynamic:
        message = "a float32 tensor cannot be dynamic"
        yield Contradiction(("is_dynamic",), message, 'use "float16"')
    if _observes(spec):
        message = f"a {spec.dtype} tensor is not observed"
        yield Contradiction(_OBSERVER, message, "remove the observer")


def _of_dynamic(spec: TensorSpec) -> Iterator[Contradiction]:
    """The kernel finds the range of each input itself and ignores the settings."""
    if spec.dtype not in ("int8", "uint8"):
        message = f"{spec.dtype} tensors cannot be dynamic"
        yield Contradiction(("dtype",), message, 'use "uint8", "int8" or "float16"')
    if spec.qscheme not in (None, "per_tensor_affine"):
        message = f'a dynamic tensor cannot be "{spec.qscheme}"'
        yield Contradiction(("qscheme",), message, 'use "per_tensor_affine"')
    allowed = {"dtype", "is_dynamic", "qscheme"} | (set() if _observes(spec) else {"observer"})
    for key in _written(spec, allowed):
        message = f'a dynamic tensor takes no "{key}": the kernel would ignore it'
        hint = "remove it, or define a separate tensor for dynamic use"
        yield Contradiction((key,), message, hint, is_surplus=True)


def _of_qscheme(spec: TensorSpec) -> Iterator[Contradiction]:
    observed, scaled = _observes_channels(spec), _scales_channels(spec)
    if spec.observer is not None and None not in (observed, scaled) and observed != scaled:
        unit = "channel" if observed else "tensor"
        message = (
            f'"{spec.qscheme}" contradicts the observer {shown(spec.observer.name)}, '
            f"which is per {unit}"
        )
        yield Contradiction(("qscheme",), message, cause=("observer",))
    if spec.qscheme == _FLOAT_QPARAMS and spec.dtype not in _UNSIGNED:
        message = f'"{_FLOAT_QPARAMS}" is only for uint8 and uint4, not for {spec.dtype}'
        yield Contradiction(("qscheme",), message)


def _of_range(spec: TensorSpec) -> Iterator[Contradiction]:
    low, high = spec.quant_min, spec.quant_max
    if spec.dtype is None or low is None or high is None:
        return
    least, most = QUANTIZED_RANGE[spec.dtype]
    hint = f"the range of {spec.dtype} is {least} to {most}"
    if low < least:
        message = f"quant_min = {low} is below the range of {spec.dtype}"
        yield Contradiction(("quant_min",), message, hint)
    if high > most:
        message = f"quant_max = {high} is above the range of {spec.dtype}"
        yield Contradiction(("quant_max",), message, hint)
    if low >= high:
        message = f"quant_min = {low} is not less than quant_max = {high}"
        yield Contradiction(("quant_min",), message)
    elif not low <= 0 <= high:
        key, bound = ("quant_min", "at most") if low > 0 else ("quant_max", "at least")
        message = f"the range {low} to {high} does not contain 0, as torch requires"
        yield Contradiction((key,), message, f"{key} must be {bound} 0")
    if spec.reduce_range:
        message = "reduce_range would halve the range that quant_min and quant_max set"
        yield Contradiction(("reduce_range",), message, "remove one of the two", is_surplus=True)


def _of_fixed(spec: TensorSpec) -> Iterator[Contradiction]:
    if spec.observer is None or spec.observer.name != "fixed_qparams":
        return
    zero_point, limits = spec.observer.arguments.get("zero_point"), quantized_range(spec)
    if limits is None or type(zero_point) is not int or limits[0] >= limits[1]:
        return
    if not limits[0] <= zero_point <= limits[1]:
        message = f"zero_point = {zero_point} is outside the range {limits[0]} to {limits[1]}"
        yield Contradiction(("observer", "zero_point"), message, "use an integer in the range")


def _of_fake_quant(spec: TensorSpec) -> Iterator[Contradiction]:
    if spec.fake_quant is None or spec.fake_quant.name not in FAKE_QUANTS:
        return
    name = spec.fake_quant.name
    wrapped = FAKE_QUANTS[name].observers
    observer = None if spec.observer is None else spec.observer.name
    if wrapped is not None and observer in OBSERVERS and observer not in wrapped:
        message = f'the fake-quant "{name}" cannot wrap the observer "{observer}"'
        hint = f"it wraps {shown_names(sorted(wrapped))}"
        yield Contradiction(_FAKE_QUANT, message, hint, cause=("observer",))
    if name in ("fused_moving_average", "learnable"):
        yield from _trained_otherwise(spec, name)


def _trained_otherwise(spec: TensorSpec, name: str) -> Iterator[Contradiction]:
    """Pairs that torch accepts although training and conversion differ."""
    is_symmetric = spec.qscheme is not None and spec.qscheme.endswith("symmetric")
    if spec.qscheme == _FLOAT_QPARAMS or (is_symmetric and spec.dtype in _UNSIGNED):
        message = (
            f'the fake-quant "{name}" trains with another zero point '
            f"than {spec.qscheme} {spec.dtype} has"
        )
        yield Contradiction(_FAKE_QUANT, message, 'use "fake_quantize"')
    if name == "fused_moving_average" and spec.dtype == "int4" and is_symmetric:
        message = (
            f'the fake-quant "{name}" trains with a scale that is 7 % too large for symmetric int4'
        )
        yield Contradiction(_FAKE_QUANT, message, 'use "fake_quantize"')


def _usual_qscheme(spec: TensorSpec) -> str:
    unit = "per_channel" if _observes_channels(spec) else "per_tensor"
    return f"{unit}_affine" if spec.dtype in _UNSIGNED else f"{unit}_symmetric"


def _written(spec: TensorSpec, allowed: set[str]) -> list[str]:
    return [key for key in TensorSpec.model_fields if key in spec.model_fields_set - allowed]


def _observes(spec: TensorSpec) -> bool:
    return spec.observer is not None and spec.observer.name != _PLACEHOLDER


def _scales_channels(spec: TensorSpec) -> bool | None:
    return None if spec.qscheme is None else spec.qscheme.startswith("per_channel")


def _observes_channels(spec: TensorSpec) -> bool | None:
    """Whether the observer keeps a range per channel; None if that is not known."""
    signature = OBSERVERS.get(spec.observer.name) if spec.observer else None
    return None if signature is None else signature.per_channel
