"""Which observers, fake-quants, dtypes and qschemes go together; torch-free.

torch finds out when a model is prepared, or never: some pairs train one thing and convert another.
"""

from __future__ import annotations

from collections.abc import Iterator

from qrecipe.arguments import ArgumentProblem
from qrecipe.schema import TensorSpec
from qrecipe.signatures import FAKE_QUANTS, OBSERVERS

_UNSIGNED = frozenset({"uint8", "uint4"})
_FLOAT = frozenset({"float16", "float32"})
_FLOAT_QPARAMS = "per_channel_affine_float_qparams"


def pairing_problems(spec: TensorSpec) -> list[ArgumentProblem]:
    """What contradicts itself in one tensor spec (QR109); ``argument`` is the key at fault."""
    return [
        ArgumentProblem("QR109", key, message, hint)
        for key, message, hint in (*_observer_problems(spec), *_fake_quant_problems(spec))
    ]


_Found = tuple[str, str, str]


def _observer_problems(spec: TensorSpec) -> Iterator[_Found]:
    if spec.observer is None:
        return
    name = spec.observer.name
    if name == "placeholder":
        if not spec.is_dynamic and spec.dtype not in {None, *_FLOAT}:
            message = f'observer "placeholder" finds no range for {spec.dtype}'
            yield "observer", message, "name an observer that does, or set is_dynamic"
        return
    if spec.dtype in _FLOAT:
        yield "observer", f'observer "{name}" has nothing to do for {spec.dtype}', "leave it out"
    yield from _qscheme_problems(spec, name)


def _qscheme_problems(spec: TensorSpec, name: str) -> Iterator[_Found]:
    if name not in OBSERVERS or spec.qscheme is None:
        return
    per_channel = OBSERVERS[name].per_channel
    if per_channel != spec.qscheme.startswith("per_channel"):
        wanted = "per_channel" if per_channel else "per_tensor"
        message = f'observer "{name}" and qscheme "{spec.qscheme}" contradict each other'
        yield "qscheme", message, f"this observer takes {wanted} schemes"


def _fake_quant_problems(spec: TensorSpec) -> Iterator[_Found]:
    if spec.fake_quant is None or spec.fake_quant.name not in FAKE_QUANTS:
        return
    name = spec.fake_quant.name
    wrapped = FAKE_QUANTS[name].observers
    observer = "placeholder" if spec.observer is None else spec.observer.name
    if wrapped is not None and observer in OBSERVERS and observer not in wrapped:
        one_of = ", ".join(f'"{each}"' for each in sorted(wrapped))
        message = f'fake-quant "{name}" cannot wrap observer "{observer}"'
        yield "fake_quant", message, f"it wraps {one_of}"
    yield from _trained_otherwise(spec, name)


def _trained_otherwise(spec: TensorSpec, name: str) -> Iterator[_Found]:
    """Pairs that torch accepts although training and conversion then differ."""
    if name not in {"fused_moving_average", "learnable"}:
        return
    qscheme = spec.qscheme or ""
    unsigned_symmetric = spec.dtype in _UNSIGNED and qscheme.endswith("symmetric")
    if unsigned_symmetric or qscheme == _FLOAT_QPARAMS:
        message = f'fake-quant "{name}" trains another zero point than {qscheme} {spec.dtype} has'
        yield "fake_quant", message, 'use "fake_quantize"'
    if name == "fused_moving_average" and spec.dtype == "int4" and qscheme.endswith("symmetric"):
        message = f'fake-quant "{name}" trains a scale that is 7 % larger for symmetric int4'
        yield "fake_quant", message, 'use "fake_quantize"'
