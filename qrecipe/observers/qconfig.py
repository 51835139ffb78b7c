"""Tensor spec -> observer factory -> torch's ``QConfig``; equal values share one object.

A spec first becomes a `Construction`, which is plain data, and then a factory. Ranges are passed to
torch as numbers: its ``reduce_range`` is deprecated, warns whenever it is used and is unknown to
some fake-quants.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from qrecipe._torch_ao import (
    FixedQParamsFakeQuantize,
    FixedQParamsObserver,
    MovingAverageMinMaxObserver,
    PlaceholderObserver,
    QConfig,
    _LearnableFakeQuantize,
)
from qrecipe.errors.findings import SchemaError
from qrecipe.observers import registration as registry
from qrecipe.recipe.recipe import QConfigSpec
from qrecipe.recipe.schema import (
    QUANTIZED_RANGE,
    Constructor,
    DType,
    Phase,
    QScheme,
    TensorSpec,
    frozen,
    quantized_range,
)

FLOAT_QPARAMS = "per_channel_affine_float_qparams"

_TORCH_DTYPE: dict[DType, torch.dtype] = {
    "int8": torch.qint8,
    "uint8": torch.quint8,
    "int4": torch.qint8,
    "uint4": torch.quint8,
    "int32": torch.qint32,
    "float16": torch.float16,
    "float32": torch.float32,
}

_PER_TENSOR_OBSERVER = {
    "per_channel_minmax": "minmax",
    "moving_average_per_channel_minmax": "moving_average_minmax",
}

_PER_TENSOR_QSCHEME: dict[QScheme, QScheme] = {
    "per_channel_affine": "per_tensor_affine",
    "per_channel_symmetric": "per_tensor_symmetric",
}


@dataclass(frozen=True, slots=True)
class Construction:
    """A class and its keyword arguments."""

    cls: type[Any]
    arguments: tuple[tuple[str, Any], ...] = ()


_make_qconfig: Any = QConfig  # torch leaves its constructor untyped

FLOAT = Construction(PlaceholderObserver)
"""Used for tensors that are not quantized, as in torch's weight-only qconfigs."""


def qconfig(specs: QConfigSpec, phase: Phase, channels: int = 1) -> QConfig:
    """torch's QConfig for two tensor specs: observers in ptq, fake-quants in qat.

    ``channels`` is the number of output channels of the weight; only fake-quants that learn a scale
    per channel need it.
    """
    return _qconfig(
        _construction(specs.activation, phase, 1), _construction(specs.weight, phase, channels)
    )


def factory(spec: TensorSpec | None, phase: Phase, channels: int = 1) -> Any:
    """The callable from which torch gets the observer or fake-quant of a tensor."""
    return _factory(_construction(spec, phase, channels))


def torch_dtype(spec: TensorSpec) -> torch.dtype:
    """torch's dtype for a spec: 4 bits use 8-bit types, except in torch's packed embeddings.

    Raises:
        SchemaError: the spec has no dtype (QR103).
    """
    if spec.dtype is None:
        raise SchemaError.of("QR103", 'a tensor needs a "dtype"')
    if spec.dtype == "uint4" and spec.qscheme == FLOAT_QPARAMS:
        return torch.quint4x2
    return _TORCH_DTYPE[spec.dtype]


def per_tensor(spec: TensorSpec) -> TensorSpec:
    """The spec for weights that torch only quantizes per tensor, such as ConvTranspose's.

    Observer arguments are kept; a per-tensor spec is returned unchanged.
    """
    changes: dict[str, Any] = {}
    if spec.observer is not None and spec.observer.name in _PER_TENSOR_OBSERVER:
        name = _PER_TENSOR_OBSERVER[spec.observer.name]
        changes["observer"] = spec.observer.model_copy(update={"name": name})
    if spec.qscheme in _PER_TENSOR_QSCHEME:
        changes["qscheme"] = _PER_TENSOR_QSCHEME[spec.qscheme]
    return spec.model_copy(update=changes) if changes else spec


def _construction(spec: TensorSpec | None, phase: Phase, channels: int) -> Construction:
    if spec is None:
        return FLOAT
    observer = _observer(spec)
    if phase == "ptq" or quantized_range(spec) is None:
        return observer
    return _fake_quant(spec, observer, channels)


def _observer(spec: TensorSpec) -> Construction:
    chosen = spec.observer or Constructor(name="placeholder")
    cls = registry.class_of("observer", chosen.name)
    own = registry.constructor_arguments("observer", chosen.name, chosen.arguments)
    given = {**_spec_arguments(spec), **own}
    if cls is PlaceholderObserver and spec.is_dynamic:
        given |= _range_arguments(spec)
    return _call(cls, given)


def _spec_arguments(spec: TensorSpec) -> dict[str, Any]:
    """The observer's arguments set by the spec; the full range of a dtype is left to torch."""
    dtype = torch_dtype(spec)
    given: dict[str, Any] = {"dtype": dtype}
    if spec.qscheme is not None:
        given["qscheme"] = getattr(torch, spec.qscheme)
    if quantized_range(spec) != _full_range(dtype):
        given |= _range_arguments(spec)
    if spec.eps is not None:
        given["eps"] = spec.eps
    if spec.is_dynamic:
        given["is_dynamic"] = True
    return given


def _full_range(dtype: torch.dtype) -> tuple[int, int] | None:
    return {
        torch.qint8: QUANTIZED_RANGE["int8"],
        torch.quint8: QUANTIZED_RANGE["uint8"],
        torch.quint4x2: QUANTIZED_RANGE["uint4"],
        torch.qint32: QUANTIZED_RANGE["int32"],
    }.get(dtype)


def _range_arguments(spec: TensorSpec) -> dict[str, int]:
    limits = quantized_range(spec)
    return {} if limits is None else {"quant_min": limits[0], "quant_max": limits[1]}


def _fake_quant(spec: TensorSpec, observer: Construction, channels: int) -> Construction:
    if observer.cls is FixedQParamsObserver:
        return _call(FixedQParamsFakeQuantize, {"observer": observer})
    if observer.cls is PlaceholderObserver:
        # without memory: the range of each input, for training dynamic quantization
        given = {**_spec_arguments(spec), "averaging_constant": 1}
        observer = _call(MovingAverageMinMaxObserver, given)
    chosen = spec.fake_quant or Constructor(name="fake_quantize")
    cls = registry.class_of("fake_quant", chosen.name)
    own = registry.constructor_arguments("fake_quant", chosen.name, chosen.arguments)
    arguments = {"observer": observer, **_overriding_arguments(cls, spec), **own}
    if cls is _LearnableFakeQuantize and (spec.qscheme or "").startswith("per_channel"):
        arguments["channel_len"] = channels
    return _call(cls, arguments)


def _overriding_arguments(cls: type[Any], spec: TensorSpec) -> dict[str, Any]:
    """The arguments that a fake-quant always passes to its observer, so it must get them too."""
    given: dict[str, Any] = dict(_range_arguments(spec))
    if spec.is_dynamic:
        given["is_dynamic"] = True
    parameters = inspect.signature(cls).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {name: value for name, value in given.items() if takes_all or name in parameters}


def _call(cls: type[Any], arguments: Mapping[str, Any]) -> Construction:
    return Construction(cls, tuple((name, frozen(arguments[name])) for name in sorted(arguments)))


@cache
def _qconfig(activation: Construction, weight: Construction) -> QConfig:
    made: QConfig = _make_qconfig(activation=_factory(activation), weight=_factory(weight))
    return made


@cache
def _factory(construction: Construction) -> Any:
    if not construction.arguments:
        return construction.cls
    arguments = {
        name: _factory(value) if isinstance(value, Construction) else value
        for name, value in construction.arguments
    }
    return construction.cls.with_args(**arguments)
