"""The observers of a prepared graph, and whether they ended up with usable ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe._torch_ao import FakeQuantizeBase, ObserverBase, StandIn, _LearnableFakeQuantize
from qrecipe.errors.findings import CalibrationError, Finding
from qrecipe.errors.text import first_line
from qrecipe.model.addresses import observed_name, site_of
from qrecipe.model.nodes import called_modules
from qrecipe.model.unfit import all_finite
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.rules.resolution import listed

_LEAST_SCALE = torch.finfo(torch.float32).eps


def static_observers(part: fx.GraphModule) -> Iterator[tuple[str, ObserverBase]]:
    """The observers of static ranges in graph order, with what they observe.

    Those in fake-quants count too.
    """
    for name, _, observer in static_owners(part):
        yield name, observer


def static_owners(part: fx.GraphModule) -> Iterator[tuple[str, nn.Module, ObserverBase]]:
    """As `static_observers`, with the fake-quant that the observer is in, or the observer again."""
    for node, observer in called_modules(part.graph):
        owner: Any = None
        while hasattr(observer, "activation_post_process"):
            owner = observer if isinstance(observer, FakeQuantizeBase) else owner
            observer = observer.activation_post_process
        if isinstance(observer, ObserverBase) and quantizes(observer):
            yield observed_name(node), owner or observer, observer


def quantizes(observer: ObserverBase) -> bool:
    """Whether there is a range to observe."""
    is_dynamic = bool(getattr(observer, "is_dynamic", False))
    return not is_dynamic and observer.dtype not in (torch.float16, torch.float32)


def observes(prepared: nn.Module) -> bool:
    """Whether there are ranges to observe, which dynamic and float sites don't have."""
    return any(
        isinstance(module, ObserverBase) and quantizes(module) for module in prepared.modules()
    )


def range_findings(part: fx.GraphModule) -> Iterator[Finding]:
    """Observers and fake-quants of activations without a finite range or valid qparams (QR404)."""
    for name, observer in static_observers(part):
        kind = type(observer)
        lowest = getattr(observer, "min_val", None)
        if isinstance(lowest, Tensor) and not _is_finite(lowest):
            yield Finding(
                "QR404",
                f"the observer of {name} saw no finite value in calibration",
                hint="calibrate with data that reaches this site and is finite there; does the "
                "float model itself give NaN?",
            )
        # torch's own give valid qparams for finite ranges; histograms are slow
        elif not kind.__module__.startswith("torch.") and (problem := _qparams_problem(observer)):
            yield Finding(
                "QR404",
                f"the observer of {name} ({kind.__name__}) gives {problem}",
                hint="fix the observer: scales must be finite and positive, zero points within "
                "the range",
            )


def check_ranges(parts: Iterable[fx.GraphModule]) -> None:
    """Raises ``CalibrationError`` (QR404) if a range is unusable."""
    if found := list(chain.from_iterable(map(range_findings, parts))):
        raise CalibrationError(found)


def check_calibrated(parts: Sequence[fx.GraphModule]) -> None:
    """Raises ``CalibrationError`` if no batch was seen (QR401) or a range is unusable (QR404)."""
    hint = "run qrecipe.calibrate(prepared, batches) first"
    _check_seen(parts, "the prepared model was never calibrated", hint)
    check_ranges(parts)


def check_trained(parts: Sequence[fx.GraphModule]) -> None:
    """As `check_calibrated`, for fake-quants, including those of weights."""
    for part in parts:
        _check_dtypes(part)
    hint = "train it, or run qrecipe.calibrate(prepared, batches)"
    _check_seen(parts, "the prepared model never saw a batch", hint)
    found = [each for part in parts for each in (*range_findings(part), *_trained(part))]
    if found := [*_diverged(parts), *found]:
        raise CalibrationError(found)


def _check_dtypes(part: fx.GraphModule) -> None:
    """Raises ``CalibrationError`` (QR406) for a model that ``to()`` has cast or moved."""
    for module in part.modules():
        scale = getattr(module, "scale", None)
        if not isinstance(module, FakeQuantizeBase) or not isinstance(scale, Tensor):
            continue
        if scale.dtype != torch.float32 or scale.device.type != "cpu":
            where = f"{str(scale.dtype).removeprefix('torch.')} on {scale.device.type}"
            raise CalibrationError.of(
                "QR406",
                f"the prepared model was cast or moved: it is in {where}",
                hint='convert it in float32 on the CPU: prepared.to("cpu", torch.float32)',
            )


def _diverged(parts: Iterable[fx.GraphModule]) -> Iterator[Finding]:
    """Trained weights and statistics with NaN or infinity (QR404)."""
    names = [
        name
        for part in parts
        for name, tensor in part.state_dict(keep_vars=True).items()
        if isinstance(tensor, nn.Parameter) or ".running_" in name
        if not all_finite(tensor)
    ]
    if names:
        yield Finding(
            "QR404",
            f"training has put NaN or infinity in {listed(names)}",
            hint="did the training diverge? check the loss, lower the learning rate",
        )


def _check_seen(parts: Sequence[fx.GraphModule], unseen: str, hint: str) -> None:
    for part in parts:
        observers = [observer for _, observer in static_observers(part)]
        extremes = [each.min_val for each in observers if hasattr(each, "min_val")]
        if extremes and not any(map(_is_finite, extremes)):
            raise CalibrationError.of("QR401", unseen, hint=hint)


def _trained(part: fx.GraphModule) -> Iterator[Finding]:
    """Fake-quants (also of weights) whose qparams are unusable after training (QR404)."""
    observing = _calls(part)
    for path, module in part.named_modules():
        if isinstance(module, FakeQuantizeBase) and (problem := _qparams_problem(module)):
            yield Finding(
                "QR404",
                f"the fake-quant of {_rounded_by(path, part, observing)} gives {problem}",
                hint="did the training diverge? check the loss, lower the learning rate; "
                "learnable scales are more stable with use_grad_scaling = true",
            )


def observed_tensor(part: fx.GraphModule, observer: nn.Module) -> str | None:
    """What an observer or fake-quant of a prepared part sees, by its site."""
    path = next((path for path, each in part.named_modules() if each is observer), None)
    return None if path is None else _rounded_by(path, part, _calls(part))


def _calls(part: fx.GraphModule) -> Mapping[str, fx.Node]:
    """The first node that calls each module, by the module's path."""
    return {str(node.target): node for node in reversed(part.graph.nodes)}


def _rounded_by(path: str, part: fx.GraphModule, observing: Mapping[str, fx.Node]) -> str:
    owner, _, name = path.rpartition(".")
    called = path
    while called not in observing:
        called = called.rpartition(".")[0]
        if not isinstance(part.get_submodule(called), StandIn):
            return f"the weights of {owner}"
    if called == path or name == "activation_post_process":
        return observed_name(observing[called])
    return f"the weights of {site_of(next(iter(observing[called].users)))}"


def _is_finite(extreme: object) -> bool:
    return (
        isinstance(extreme, Tensor)
        and bool(extreme.numel())
        and bool(torch.isfinite(extreme).all())
    )


def _qparams_problem(module: ObserverBase | FakeQuantizeBase) -> str | None:
    calculate_qparams: Callable[[], tuple[Tensor, Tensor]] = module.calculate_qparams
    try:
        scale, zero_point = calculate_qparams()
    except Exception as error:
        raise_lack_of_memory(error)
        return f"no qparams: {first_line(error)}"
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        return "a scale that is not finite and positive"
    if isinstance(module, _LearnableFakeQuantize) and bool((scale <= _LEAST_SCALE).any()):
        return "a scale that collapsed to the smallest possible value"
    if getattr(module, "qscheme", None) == torch.per_channel_affine_float_qparams:
        return None  # a float zero point per row, in units of its scale
    low, high = getattr(module, "quant_min", None), getattr(module, "quant_max", None)
    if low is None or high is None or bool(((zero_point >= low) & (zero_point <= high)).all()):
        return None
    return f"a zero point outside {low}..{high}"
