"""Channels of similar range in what linear layers read, by powers of two that their weights undo.

Source: Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models (2023).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qrecipe.model.copies import runnable_copy
from qrecipe.model.opened.opening import opened_at
from qrecipe.model.scaled_input import scale_input
from qrecipe.planning.plan import Group, Plan, Site
from qrecipe.recipe.schema import quantized_range
from qrecipe.transforms.base import Scaled, Transform, TransformContext
from qrecipe.transforms.channels import divide_channels
from qrecipe.transforms.reads import Read, of_all_ranks, reads_of
from qrecipe.transforms.record import Spread, spread

_MOST = 10
"""The largest exponent."""

_DEAD_ACTIVATION = 1e-6
_DEAD_WEIGHT = 1e-10

_CLEAR = 0.8
"""A clear gain: so much of the error is left at most, which is 1 dB."""

_WEIGHT_BITS = 8


def smoothed(
    model: nn.Module, group: Group, read: Read, alphas: Sequence[float], plan: Plan
) -> Group:
    """A group with its exponents, for the alpha with the smallest error of what its layers give.

    Without a clear gain, the group stays as it is and has no alpha. ``model`` is opened.
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
        divide_channels(view.get_submodule(group.at), factor)


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
        # layers of a group read the same
        with reads_of(probe, [group.sites[0] for group in wanted], keep_rows=True) as reads:
            context.run(probe)
        reads = of_all_ranks(reads)
        seen = {group: reads[group.sites[0]] for group in wanted}
        made = {group: smoothed(opened, group, seen[group], self._alphas, plan) for group in wanted}
        apply_groups(model, opened_paths, list(made.values()))
        spreads = (_spread(made[group], seen[group]) for group in wanted)
        groups = tuple(made.get(group, group) for group in plan.groups)
        return Scaled(groups=groups, spreads=tuple(spreads))


def _spread(group: Group, read: Read) -> Spread:
    exponents = torch.tensor(group.exponents)
    return spread(group.at or "a product", ", ".join(group.sites), read.largest, exponents)
