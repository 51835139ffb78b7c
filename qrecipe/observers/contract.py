"""The contract of observers and fake-quants, tested on small tensors at registration."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qrecipe._torch_ao import (
    FakeQuantizeBase,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    ObserverBase,
    quiet,
)
from qrecipe.errors.findings import Finding
from qrecipe.errors.text import shown
from qrecipe.process.neutral import neutral
from qrecipe.process.state import random_numbers_kept
from qrecipe.registry.arguments import KIND_TITLE, Kind


@dataclass(frozen=True, slots=True)
class _Scheme:
    """One kind of quantization; a class must fulfill the contract for those that it accepts."""

    dtype: torch.dtype
    qscheme: torch.qscheme
    low: int
    high: int

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "qscheme": self.qscheme,
            "quant_min": self.low,
            "quant_max": self.high,
        }

    @property
    def per_channel(self) -> bool:
        return self.qscheme in (torch.per_channel_affine, torch.per_channel_symmetric)


_SCHEMES = (
    _Scheme(torch.quint8, torch.per_tensor_affine, 0, 127),
    _Scheme(torch.qint8, torch.per_tensor_symmetric, -8, 7),
    _Scheme(torch.quint8, torch.per_channel_affine, 0, 255),
    _Scheme(torch.qint8, torch.per_channel_symmetric, -127, 127),
)


def _samples() -> dict[str, torch.Tensor]:
    """Created on demand, since the module may be imported in any mode of torch."""
    return {
        "a random batch": torch.linspace(-2.0, 3.0, 48).sin().reshape(4, 3, 4),
        "a batch of zeros": torch.zeros(4, 3, 4),
        "a batch of tiny values": torch.full((4, 3, 4), 1e-30),
    }


@neutral
def contract_findings(kind: Kind, name: str, cls: object) -> list[Finding]:
    """All problems of ``cls`` as an observer or fake-quant called ``name``."""
    base = ObserverBase if kind == "observer" else FakeQuantizeBase
    title = f"{KIND_TITLE[kind]} {shown(name)}"
    if not (isinstance(cls, type) and issubclass(cls, base)):
        given = cls.__qualname__ if isinstance(cls, type) else repr(cls)
        mend = f"derive it from {base.__module__}.{base.__qualname__}"
        return [
            Finding("QR150", f"{title}: {given} is not a subclass of {base.__name__}", hint=mend)
        ]
    if kind == "observer":
        problems = _problems(cls, lambda scheme: scheme.arguments, _observation_problems)
    else:
        problems = _problems(cls, _fake_quant_arguments, _training_problems)
    with quiet(), random_numbers_kept():
        distinct = dict(problems)
    return [Finding("QR150", f"{title} {what}", hint=mend) for what, mend in distinct.items()]


_Problem = tuple[str, str]


def _problems(
    cls: type[Any],
    arguments_of: Callable[[_Scheme], dict[str, Any]],
    check: Callable[[Any, _Scheme, str, Tensor], Iterator[_Problem]],
) -> Iterator[_Problem]:
    """The problems with each scheme that the class accepts, and that it accepts none."""
    arguments = {scheme: arguments_of(scheme) for scheme in _SCHEMES}
    refusals = {scheme: _refusal_of(cls, arguments[scheme]) for scheme in _SCHEMES}
    if all(refusals.values()):
        *names, last = arguments[_SCHEMES[0]]
        named = f"{', '.join(names)} and {last}"
        yield (
            f"cannot be created with {named}: {refusals[_SCHEMES[0]]}",
            f"accept {named} by keyword, pass them on to super().__init__ "
            "and give all other arguments a default",
        )
    for scheme in (scheme for scheme in _SCHEMES if not refusals[scheme]):
        for sample, batch in _samples().items():
            yield from check(cls(**arguments[scheme]), scheme, sample, batch)


def _refusal_of(cls: type[Any], arguments: dict[str, Any]) -> str | None:
    """Why the class rejects these arguments; None if it accepts them."""
    try:
        cls(**arguments)
    except Exception as error:
        return _shown(error)
    return None


def _attribute_problems(observer: ObserverBase, scheme: _Scheme) -> Iterator[_Problem]:
    for name, asked in scheme.arguments.items():
        if getattr(observer, name, None) != asked:
            more = " and quantize to that range" if name.startswith("quant_") else ""
            mend = f"set self.{name} = {name} in __init__{more}"
            yield f"does not keep the {name} that it is given", mend


def _observation_problems(
    observer: ObserverBase, scheme: _Scheme, sample: str, batch: Tensor
) -> Iterator[_Problem]:
    yield from _attribute_problems(observer, scheme)
    try:
        seen = observer(batch.clone())
    except Exception as error:
        yield f"fails on {sample}: {_shown(error)}", "mend its forward"
        return
    if not (isinstance(seen, Tensor) and torch.equal(seen, batch)):
        yield "changes the tensor that it observes", "return the input of forward unchanged"
    yield from _copy_problems(observer)
    yield from _qparams_problems(observer, scheme, sample)


def _qparams_problems(module: Any, scheme: _Scheme, sample: str) -> Iterator[_Problem]:
    mend = "return the tensors (scale, zero_point) from calculate_qparams"
    try:
        scale, zero_point = module.calculate_qparams()
    except Exception as error:
        yield f"fails in calculate_qparams after {sample}: {_shown(error)}", mend
        return
    if not (isinstance(scale, Tensor) and isinstance(zero_point, Tensor)):
        yield "gives numbers that are not in tensors", mend
        return
    if not (torch.isfinite(scale).all() and (scale > 0).all()):
        yield (
            f"gives a scale that is not finite and positive after {sample}",
            "keep the scale at or above eps: scale.clamp(min=self.eps)",
        )
    if not ((zero_point >= scheme.low).all() and (zero_point <= scheme.high).all()):
        yield (
            f"gives a zero point outside quant_min..quant_max after {sample}",
            "clamp it: zero_point.clamp(self.quant_min, self.quant_max)",
        )
    if scale.shape != zero_point.shape:
        yield (
            f"gives a scale and a zero point of different shapes after {sample}",
            "return one value for both, or one value per channel for both",
        )
    elif not scheme.per_channel and scale.numel() != 1:
        yield (
            f"gives {scale.numel()} scales for a whole tensor after {sample}",
            "return one value for qschemes per tensor",
        )


def _copy_problems(module: Any) -> Iterator[_Problem]:
    """Preparing and converting a model copy it, with what it has observed."""
    try:
        copy.deepcopy(module)
    except Exception as error:
        yield f"cannot be copied: {_shown(error)}", "let copy.deepcopy copy it"


def _fake_quant_arguments(scheme: _Scheme) -> dict[str, Any]:
    observer: Any = (
        MovingAveragePerChannelMinMaxObserver if scheme.per_channel else MovingAverageMinMaxObserver
    )
    return {
        "observer": observer.with_args(**scheme.arguments),
        "quant_min": scheme.low,
        "quant_max": scheme.high,
    }


def _training_problems(
    fake_quant: Any, scheme: _Scheme, sample: str, batch: Tensor
) -> Iterator[_Problem]:
    if not isinstance(getattr(fake_quant, "activation_post_process", None), ObserverBase):
        yield (
            "has no observer in activation_post_process",
            "set self.activation_post_process = observer() in __init__",
        )
    x = batch.clone().requires_grad_()
    try:
        y = fake_quant(x)
    except Exception as error:
        yield f"fails on {sample}: {_shown(error)}", "mend its forward"
        return
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        yield (
            "changes the shape or dtype of its input",
            "return a float tensor of the input's shape from forward",
        )
        return
    yield from _gradient_problems(x, y)
    yield from _copy_problems(fake_quant)
    yield from _qparams_problems(fake_quant, scheme, sample)


def _gradient_problems(x: Tensor, y: Tensor) -> Iterator[_Problem]:
    mend = "let gradients pass the rounding, as torch.fake_quantize_per_tensor_affine does"
    if not y.requires_grad:
        yield "blocks the gradient of its input", mend
        return
    (gradient,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
    if gradient is None or not torch.isfinite(gradient).all():
        yield "gives its input a gradient that is not finite", mend


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
