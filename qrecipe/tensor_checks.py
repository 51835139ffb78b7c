"""Whether a tensor spec is free of contradictions, and fit for what it is used for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qrecipe.composition import Composition
from qrecipe.errors import Finding
from qrecipe.locations import KeyPath
from qrecipe.merging import SettingPath
from qrecipe.schema import QUANTIZED_RANGE, Constructor, TensorSpec
from qrecipe.signatures import FAKE_QUANTS, OBSERVERS, Kind, check_arguments
from qrecipe.wording import dotted

_FLOAT_DTYPES = frozenset({"float16", "float32"})
_FLOAT_QPARAMS = "per_channel_affine_float_qparams"
_PLACEHOLDER = "placeholder"


def tensor_findings(recipe: Composition, name: str, spec: TensorSpec) -> Iterator[Finding]:
    """What is wrong with ``[tensor.NAME]`` whatever it is used for."""
    path = ("tensor", name)
    yield from _constructor_findings(recipe, "observer", path, spec.observer)
    yield from _constructor_findings(recipe, "fake_quant", path, spec.fake_quant)
    if spec.dtype is None:
        if recipe.is_sound(*path):
            hint = 'for example dtype = "int8"'
            yield recipe.about_key("QR103", f"{dotted(path)} needs a dtype", path, hint)
    elif spec.dtype in _FLOAT_DTYPES:
        yield from _float_findings(recipe, path, spec)
    elif spec.is_dynamic:
        yield from _dynamic_findings(recipe, path, spec)
    else:
        yield from _static_findings(recipe, path, spec)
        yield from _range_findings(recipe, path, spec)


def is_per_channel(spec: TensorSpec) -> bool:
    """Whether every channel gets a scale of its own."""
    return _scales_channels(spec) or _observes_channels(spec) is True


def weight_findings(
    recipe: Composition, use: KeyPath, name: str, spec: TensorSpec
) -> Iterator[Finding]:
    """What keeps a tensor spec from being a weight; ``use`` is the path that names it."""
    if spec.reduce_range:
        yield _misuse(
            recipe,
            use,
            f'"{name}" reduces its range, which only activations can',
            ("tensor", name, "reduce_range"),
            "use a tensor without reduce_range",
        )
    if spec.is_dynamic and spec.dtype not in _FLOAT_DTYPES:
        yield _misuse(
            recipe,
            use,
            f'"{name}" is dynamic, which a weight cannot be',
            ("tensor", name, "is_dynamic"),
            "only activations have ranges that change at run time",
        )


def activation_findings(
    recipe: Composition, use: KeyPath, name: str, spec: TensorSpec
) -> Iterator[Finding]:
    """What keeps a tensor spec from being an activation; ``use`` is the path that names it."""
    if is_per_channel(spec):
        yield _misuse(
            recipe,
            use,
            f'"{name}" is per channel, for which no kernel takes activations',
            ("tensor", name, "qscheme" if _scales_channels(spec) else "observer"),
            "use a per-tensor observer and qscheme",
        )


def _misuse(recipe: Composition, use: KeyPath, message: str, cause: KeyPath, hint: str) -> Finding:
    finding = recipe.about_value("QR109", message, use, hint)
    return _related(recipe, finding, cause)


def _related(recipe: Composition, finding: Finding, cause: KeyPath) -> Finding:
    return replace(finding, related=(("set at", recipe.owner(cause).key(cause)),))


def _constructor_findings(
    recipe: Composition, kind: Kind, path: SettingPath, constructor: Constructor | None
) -> Iterator[Finding]:
    if constructor is None:
        return
    for problem in check_arguments(kind, constructor.name, constructor.arguments):
        at = (*path, kind, "name" if problem.argument is None else problem.argument)
        about = recipe.about_key if problem.code == "QR105" else recipe.about_value
        yield about(problem.code, problem.message, at, problem.hint)


def _float_findings(recipe: Composition, path: SettingPath, spec: TensorSpec) -> Iterator[Finding]:
    """float16 and float32 are kept as they are: nothing is scaled, nothing observed."""
    allowed = {"dtype", "is_dynamic", "observer"}
    for key in _written(spec, allowed):
        message = f'a {spec.dtype} tensor is not scaled and takes no "{key}"'
        yield recipe.about_key("QR109", message, (*path, key), "remove it")
    if spec.dtype == "float32" and spec.is_dynamic:
        message = "a float32 tensor cannot be dynamic"
        yield recipe.about_value("QR109", message, (*path, "is_dynamic"), 'use "float16"')
    if _observes(spec):
        message = f"a {spec.dtype} tensor is not observed"
        hint = "remove the observer"
        yield recipe.about_value("QR109", message, (*path, "observer"), hint)


def _dynamic_findings(
    recipe: Composition, path: SettingPath, spec: TensorSpec
) -> Iterator[Finding]:
    """The kernel finds the range of each input itself, and ignores every wish."""
    if spec.dtype not in ("int8", "uint8"):
        message = f"a {spec.dtype} tensor cannot be dynamic"
        hint = 'use "uint8", "int8" or "float16"'
        yield recipe.about_value("QR109", message, (*path, "dtype"), hint)
    if spec.qscheme not in (None, "per_tensor_affine"):
        message = f'a dynamic tensor cannot be "{spec.qscheme}"'
        hint = 'use "per_tensor_affine"'
        yield recipe.about_value("QR109", message, (*path, "qscheme"), hint)
    allowed = {"dtype", "is_dynamic", "qscheme"}
    if not _observes(spec):
        allowed.add("observer")
    for key in _written(spec, allowed):
        message = f'a dynamic tensor takes no "{key}": the kernel would ignore it'
        hint = "remove it, or define a tensor of its own for dynamic use"
        yield recipe.about_key("QR109", message, (*path, key), hint)


def _static_findings(recipe: Composition, path: SettingPath, spec: TensorSpec) -> Iterator[Finding]:
    if spec.observer is None:
        message = f"{dotted(path)} needs an observer"
        hint = 'for example observer = "minmax"'
        if recipe.is_sound(*path):
            yield recipe.about_key("QR103", message, path, hint)
        return
    observer = spec.observer.name
    if observer == _PLACEHOLDER:
        message = f"a placeholder observes nothing, and {spec.dtype} needs a range"
        hint = "use it for is_dynamic, float16 or float32"
        yield recipe.about_value("QR109", message, (*path, "observer"), hint)
    by_channel = _observes_channels(spec)
    if None not in (by_channel, spec.qscheme) and by_channel != _scales_channels(spec):
        unit = "channel" if by_channel else "tensor"
        message = f'"{spec.qscheme}" contradicts the observer "{observer}", which is per {unit}'
        finding = recipe.about_value("QR109", message, (*path, "qscheme"))
        yield _related(recipe, finding, (*path, "observer"))
    if spec.qscheme == _FLOAT_QPARAMS and spec.dtype not in ("uint8", "uint4"):
        message = f'"{_FLOAT_QPARAMS}" is for uint8 and uint4, not for {spec.dtype}'
        yield recipe.about_value("QR109", message, (*path, "qscheme"))
    yield from _fake_quant_findings(recipe, path, spec, observer)


def _fake_quant_findings(
    recipe: Composition, path: SettingPath, spec: TensorSpec, observer: str
) -> Iterator[Finding]:
    signature = spec.fake_quant and FAKE_QUANTS.get(spec.fake_quant.name)
    if not spec.fake_quant or not signature or signature.observers is None:
        return
    if observer in OBSERVERS and observer not in signature.observers:
        message = f'the fake-quant "{spec.fake_quant.name}" cannot wrap the observer "{observer}"'
        hint = "it wraps " + ", ".join(f'"{name}"' for name in sorted(signature.observers))
        finding = recipe.about_value("QR109", message, (*path, "fake_quant", "name"), hint)
        yield _related(recipe, finding, (*path, "observer"))


def _range_findings(recipe: Composition, path: SettingPath, spec: TensorSpec) -> Iterator[Finding]:
    low, high = spec.quant_min, spec.quant_max
    if low is None and high is None:
        return
    if low is None or high is None:
        written, missing = (
            ("quant_min", "quant_max") if high is None else ("quant_max", "quant_min")
        )
        message = f'"{written}" needs a "{missing}" beside it'
        yield recipe.about_key("QR109", message, (*path, written))
        return
    assert spec.dtype is not None
    least, most = QUANTIZED_RANGE[spec.dtype]
    hint = f"{spec.dtype} holds {least} to {most}"
    if low < least:
        message = f"quant_min = {low} is less than {spec.dtype} can hold"
        yield recipe.about_value("QR109", message, (*path, "quant_min"), hint)
    if high > most:
        message = f"quant_max = {high} is more than {spec.dtype} can hold"
        yield recipe.about_value("QR109", message, (*path, "quant_max"), hint)
    if low >= high:
        message = f"quant_min = {low} is not less than quant_max = {high}"
        yield recipe.about_value("QR109", message, (*path, "quant_min"))
    if spec.reduce_range:
        message = "reduce_range would halve the range that quant_min and quant_max write out"
        yield recipe.about_key("QR109", message, (*path, "reduce_range"), "keep one of the two")


def _written(spec: TensorSpec, allowed: set[str]) -> list[str]:
    return [key for key in TensorSpec.model_fields if key in spec.model_fields_set - allowed]


def _observes(spec: TensorSpec) -> bool:
    return spec.observer is not None and spec.observer.name != _PLACEHOLDER


def _scales_channels(spec: TensorSpec) -> bool:
    return spec.qscheme is not None and spec.qscheme.startswith("per_channel")


def _observes_channels(spec: TensorSpec) -> bool | None:
    """Whether the observer keeps a range for every channel; None if torch's table can't tell."""
    signature = OBSERVERS.get(spec.observer.name) if spec.observer else None
    return None if signature is None else signature.per_channel
