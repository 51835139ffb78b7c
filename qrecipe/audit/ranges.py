"""Whether observers and fake-quants ended up with usable ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from qrecipe._torch_ao import FakeQuantizeBase, ObserverBase, _LearnableFakeQuantize, is_observer
from qrecipe.errors.findings import CalibrationError, Finding
from qrecipe.errors.text import first_line
from qrecipe.model.addresses import observed_name

_LEAST_SCALE = torch.finfo(torch.float32).eps


def range_findings(part: fx.GraphModule) -> Iterator[Finding]:
    """Observers and fake-quants of activations without a finite range or valid qparams (QR404)."""
    for node in part.graph.nodes:
        if node.op == "call_module":
            module = part.get_submodule(str(node.target))
            if is_observer(module) and (found := _range_finding(node, module)):
                yield found


def observes(prepared: nn.Module) -> bool:
    """Whether there are ranges to observe, which dynamic and float sites don't have."""
    return any(
        isinstance(module, ObserverBase) and quantizes(module) for module in prepared.modules()
    )


def check_calibrated(parts: Sequence[fx.GraphModule]) -> None:
    """Raises ``CalibrationError`` if no batch was seen (QR401) or a range is unusable (QR404)."""
    _check_seen(
        parts,
        "the prepared model was never calibrated",
        "run qrecipe.calibrate(prepared, batches) first",
    )
    _raise(finding for part in parts for finding in range_findings(part))


def check_trained(parts: Sequence[fx.GraphModule]) -> None:
    """As `check_calibrated`, for fake-quants, including those of weights."""
    _check_seen(
        parts,
        "the prepared model never saw a batch",
        "train it, or run qrecipe.calibrate(prepared, batches)",
    )
    _raise(
        finding for part in parts for finding in (*range_findings(part), *_trained_findings(part))
    )


def _check_seen(parts: Sequence[fx.GraphModule], message: str, hint: str) -> None:
    if any(_never_saw_a_batch(part) for part in parts):
        raise CalibrationError(Finding("QR401", message, hint=hint))


def _raise(findings: Iterable[Finding]) -> None:
    if found := list(findings):
        raise CalibrationError(found)


def _never_saw_a_batch(part: fx.GraphModule) -> bool:
    """Whether there are ranges to observe and none has been."""
    observers = [
        observer
        for node in part.graph.nodes
        if node.op == "call_module" and (observer := _observer(part, str(node.target))) is not None
    ]
    extremes = [
        observer.min_val
        for observer in observers
        if quantizes(observer) and hasattr(observer, "min_val")
    ]
    return bool(extremes) and not any(_is_finite(extreme) for extreme in extremes)


def _trained_findings(part: fx.GraphModule) -> Iterator[Finding]:
    """Fake-quants (also of weights) whose qparams are unusable after training (QR404)."""
    observing = {str(node.target): node for node in reversed(part.graph.nodes)}
    for path, module in part.named_modules():
        if isinstance(module, FakeQuantizeBase) and (problem := _qparams_problem(module)):
            owner = path.rpartition(".")[0]
            is_weights = path not in observing
            name = f"the weights of {owner}" if is_weights else observed_name(observing[path])
            yield Finding(
                "QR404",
                f"the fake-quant of {name} gives {problem}",
                hint="did the training diverge? check the loss, lower the learning rate; "
                "learnable scales are more stable with use_grad_scaling = true",
            )


def _observer(part: fx.GraphModule, target: str) -> ObserverBase | None:
    module = part.get_submodule(target)
    inner = getattr(module, "activation_post_process", module)
    return inner if isinstance(inner, ObserverBase) else None


def _range_finding(node: fx.Node, module: nn.Module) -> Finding | None:
    observer = getattr(module, "activation_post_process", module)
    if not isinstance(observer, ObserverBase) or not quantizes(observer):
        return None
    name = observed_name(node)
    lowest = getattr(observer, "min_val", None)
    if isinstance(lowest, Tensor) and not _is_finite(lowest):
        return Finding(
            "QR404",
            f"the observer of {name} saw no finite value in calibration",
            hint="calibrate with data that reaches this site and is finite there; does the "
            "float model itself give NaN?",
        )
    if type(observer).__module__.startswith("torch."):
        return None  # torch's own give valid qparams for finite ranges; histograms are slow
    problem = _qparams_problem(observer)
    if problem is None:
        return None
    return Finding(
        "QR404",
        f"the observer of {name} ({type(observer).__name__}) gives {problem}",
        hint="fix the observer: scales must be finite and positive, zero points within the range",
    )


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
        return f"no qparams: {first_line(error)}"
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        return "a scale that is not finite and positive"
    if isinstance(module, _LearnableFakeQuantize) and bool((scale <= _LEAST_SCALE).any()):
        return "a scale that collapsed to the smallest possible value"
    return _zero_point_problem(module, zero_point)


def _zero_point_problem(module: ObserverBase | FakeQuantizeBase, zero_point: Tensor) -> str | None:
    low, high = getattr(module, "quant_min", None), getattr(module, "quant_max", None)
    if getattr(module, "qscheme", None) == torch.per_channel_affine_float_qparams:
        return None  # a float zero point per row, in units of its scale
    if low is None or high is None or bool(((zero_point >= low) & (zero_point <= high)).all()):
        return None
    return f"a zero point outside {low}..{high}"


def quantizes(observer: ObserverBase) -> bool:
    is_dynamic = bool(getattr(observer, "is_dynamic", False))
    return not is_dynamic and observer.dtype not in (torch.float16, torch.float32)
