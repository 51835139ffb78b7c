"""Channels of similar range in what linear layers read, by powers of two that their weights undo.

Source: Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models (2023).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from qrecipe.execution.watched import inputs_watched
from qrecipe.model.copies import runnable_copy
from qrecipe.model.opened.opening import opened_at
from qrecipe.model.scaled_input import scale_input
from qrecipe.planning.plan import Group, Plan, Site
from qrecipe.process import ranks
from qrecipe.recipe.schema import quantized_range
from qrecipe.transforms.base import Scaled, Transform, TransformContext
from qrecipe.transforms.record import Spread, spread_of

_MOST = 10
"""The largest exponent."""

_DEAD_ACTIVATION = 1e-6
_DEAD_WEIGHT = 1e-10

_BATCHES, _ROWS = 16, 16
"""What the error of an alpha is measured on: so many rows of so many batches."""

_CLEAR = 0.8
"""A clear gain: so much of the error is left at most, which is 1 dB."""

_WEIGHT_BITS = 8


@dataclass(slots=True)
class Read:
    """What a group reads: the extremes of each channel, [channels], and rows, [..., channels]."""

    extremes: tuple[Tensor, Tensor] | None = None
    rows: list[Tensor] = field(default_factory=list)

    def see(self, x: Tensor) -> None:
        """Take another tensor into account. [..., channels]"""
        flat = x.detach().reshape(-1, x.shape[-1])
        if not flat.numel():
            return
        low, high = flat.amin(0), flat.amax(0)
        if self.extremes is not None:
            low, high = low.minimum(self.extremes[0]), high.maximum(self.extremes[1])
        self.extremes = low, high
        if len(self.rows) < _BATCHES:
            self.rows.append(flat[:: max(1, len(flat) // _ROWS)][:_ROWS].clone())

    @property
    def largest(self) -> Tensor | None:
        """The largest absolute value of each channel, None if nothing was read. [channels]"""
        if self.extremes is None:
            return None
        low, high = self.extremes
        return low.abs().maximum(high.abs())


@contextmanager
def watching(model: nn.Module, groups: Sequence[Group]) -> Iterator[Mapping[Group, Read]]:
    """Note what groups of one of our opened models read inside a ``with``."""
    seen = {group: Read() for group in groups}
    with ExitStack() as hooks:
        for group, read in seen.items():
            layer = model.get_submodule(group.sites[0])
            hooks.enter_context(inputs_watched(layer, read.see))
        yield seen


def of_all_ranks(seen: Mapping[Group, Read]) -> Mapping[Group, Read]:
    """What all ranks saw. Raises ``CalibrationError`` (QR409) if one of them failed."""
    found = ranks.gathered("what groups read", lambda: list(seen.values()))
    return {group: _merged(own) for group, own in zip(seen, zip(*found, strict=True), strict=True)}


def _merged(reads: Sequence[Read]) -> Read:
    """As one process would have seen it, which takes the ranks' batches in turn."""
    ends = [read.extremes for read in reads if read.extremes is not None]
    if not ends:
        return reads[0]
    low, high = (torch.stack(each) for each in zip(*ends, strict=True))
    turns = zip_longest(*(read.rows for read in reads))
    rows = [each for turn in turns for each in turn if each is not None]
    return Read((low.amin(0), high.amax(0)), rows[:_BATCHES])


def smoothed(
    model: nn.Module, group: Group, read: Read, alphas: Sequence[float], plan: Plan
) -> Group:
    """A group with its exponents, for the alpha with the smallest error of what its layers give.

    If that is no clear gain, the group stays as it is, and has no alpha. ``model`` is opened.
    """
    sites = [plan[name] for name in group.sites]
    weights = [_weight(model, name) for name in group.sites]
    largest = read.largest
    plain = weights[0].new_zeros(weights[0].shape[1])
    best: tuple[float | None, Tensor] = None, plain
    if largest is not None and bool(largest.isfinite().all()):
        found = [(alpha, _exponents(largest, weights, alpha)) for alpha in alphas]
        errors = [_error(read, weights, exponents, sites) for _, exponents in found]
        if min(errors) <= _CLEAR * _error(read, weights, plain, sites):
            best = found[errors.index(min(errors))]
    alpha, exponents = best
    return replace(group, alpha=alpha, exponents=tuple(map(int, exponents.tolist())))


def _weight(model: nn.Module, name: str) -> Tensor:
    layer: Any = model.get_submodule(name)
    weight: Tensor = layer.weight.detach()
    return weight


def _exponents(largest: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), to the nearest power of two. [channels]"""
    of_weights = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    dead = (largest < _DEAD_ACTIVATION) | (of_weights < _DEAD_WEIGHT)
    if bool(dead.all()):
        return torch.zeros_like(largest)
    scale = alpha * largest.log2() - (1 - alpha) * of_weights.log2()
    scale = scale - scale[~dead].mean()
    return torch.where(dead, 0.0, scale.round().clamp(-_MOST, _MOST))


def _error(
    read: Read, weights: Sequence[Tensor], exponents: Tensor, sites: Sequence[Site]
) -> float:
    """The squared error of what the layers give, in parts of its square, if both are rounded."""
    assert read.extremes is not None
    factor = exponents.exp2()
    rows = torch.cat(read.rows)
    least, most = (end / factor for end in read.extremes)
    low, high = min(float(least.min()), 0.0), max(float(most.max()), 0.0)
    error, total = 0.0, 0.0
    for weight, site in zip(weights, sites, strict=True):
        expected = rows @ weight.t()
        given = _rounded(rows / factor, low, high, site) @ _rounded_weight(weight * factor).t()
        error += float((given - expected).square().sum())
        total += float(expected.square().sum())
    return error / total if total else 0.0


def _rounded(x: Tensor, low: float, high: float, site: Site) -> Tensor:
    spec = None if site.qconfig is None else site.qconfig.activation
    bottom, top = (spec and quantized_range(spec)) or (0, 255)
    if site.mode == "dynamic":  # its kernels use 7 bits on x86
        top = (top + bottom) // 2
    scale = max((high - low) / (top - bottom), torch.finfo(torch.float32).tiny)
    zero_point = max(bottom, min(top, bottom - round(low / scale)))
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, bottom, top)


def _rounded_weight(weight: Tensor) -> Tensor:
    most = 2 ** (_WEIGHT_BITS - 1) - 1
    scale = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / most
    rounded: Tensor = (weight / scale).round() * scale
    return rounded


def apply_groups(
    model: nn.Module, opened: Collection[str], groups: Sequence[Group], *, undo: bool = False
) -> None:
    """Scale a model's channels as groups record it, in place, or take that back.

    ``opened`` are the paths of the layers whose linear layers show once they are opened.
    """
    view = opened_at(model, opened)  # on the same memory
    for group in groups:
        exponents = torch.tensor(group.exponents)
        if group.place == "none" or not bool(exponents.any()):
            continue
        factor = torch.exp2((-exponents if undo else exponents).to(torch.float32))
        _scale_weights(view, group, factor)
        if group.place == "product":
            layers: list[Any] = [model.get_submodule(name) for name in group.sites]
            divisor = (1 / factor).to(layers[0].weight.dtype)
            for layer in layers:  # one tensor for all, so that they share the product
                scale_input(layer, divisor)


@torch.no_grad()
def _scale_weights(view: nn.Module, group: Group, factor: Tensor) -> None:
    for name in group.sites:
        layer: Any = view.get_submodule(name)
        layer.weight.mul_(factor)
    if group.at is not None:
        giver: Any = view.get_submodule(group.at)
        for tensor in (giver.weight, giver.bias if hasattr(giver, "bias") else None):
            if tensor is not None:
                tensor.div_(factor.view(-1, *[1] * (tensor.dim() - 1)))


class Smooth(Transform):
    """``[transform.smooth]``."""

    def __init__(self, alpha: Sequence[float] = (0.7,), groups: Any = "auto") -> None:
        self._alphas = alpha

    def apply(self, model: nn.Module, context: TransformContext) -> Scaled:
        plan, opened_paths = context.plan, context._inventory.opened
        wanted = [group for group in plan.groups if group.place != "none"]
        if not wanted:
            return Scaled(groups=plan.groups)
        opened = opened_at(model, opened_paths)
        probe = runnable_copy(opened)
        with watching(probe, wanted) as seen:
            context.run(probe)
        seen = of_all_ranks(seen)
        made = {group: smoothed(opened, group, seen[group], self._alphas, plan) for group in wanted}
        apply_groups(model, opened_paths, list(made.values()))
        spreads = (_spread(made[group], seen[group].largest) for group in wanted)
        groups = tuple(made.get(group, group) for group in plan.groups)
        return Scaled(groups=groups, spreads=tuple(spreads))


def _spread(group: Group, largest: Tensor | None) -> Spread:
    after = None if largest is None else largest / torch.tensor(group.exponents).exp2()
    reader = ", ".join(group.sites)
    return Spread(group.at or "a product", reader, spread_of(largest), spread_of(after))
