"""Channels of similar range, by powers of two that the next layer undoes.

One scale has to do for all channels of an activation. Dividing a channel by a power of two and
multiplying what reads it by the same changes no result, not even in the last bit.

Sources: Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction
(2019), for the scales by weights; Xiao et al., SmoothQuant (2023), for those by activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qrecipe.model.copies import runnable_copy
from qrecipe.transforms.base import Scaled, Transform, TransformContext
from qrecipe.transforms.channels import Joint, JointTensors, joints_of
from qrecipe.transforms.reads import Read, of_all_ranks, reads_of
from qrecipe.transforms.record import spread

_ROUNDS = 3
"""Each scale by weights changes those next to it."""

_MOST_BY_WEIGHTS = 10
_MOST_BY_ACTIVATIONS = 6
"""The largest exponents."""

_SHARE = 0.5
"""How much of the difference between channels the weights take over."""

_DEAD_WEIGHT = 1e-10
_DEAD_ACTIVATION = 1e-6


def equalize_by_weights(model: nn.Module, joints: Sequence[Joint]) -> dict[Joint, Tensor]:
    """Scale a model's channels in place so that both layers have the same range in each.

    Returns the exponents by joint. [channels]
    """
    found = {joint: torch.zeros(JointTensors(model, joint).channels) for joint in joints}
    for _ in range(_ROUNDS):
        for joint in joints:
            tensors = JointTensors(model, joint)
            given, read = tensors.given(), tensors.read()
            dead = (given < _DEAD_WEIGHT) | (read < _DEAD_WEIGHT)
            wanted = found[joint] + _exponents((given / read).sqrt(), dead)
            step = wanted.clamp(-_MOST_BY_WEIGHTS, _MOST_BY_WEIGHTS) - found[joint]
            tensors.scale(step)
            found[joint] += step
    return found


def equalize_by_activations(
    model: nn.Module, joints: Sequence[Joint], seen: Mapping[Joint, Tensor | None]
) -> dict[Joint, Tensor]:
    """Scale a model's channels in place so that activations differ less between channels.

    A depthwise layer has a scale for each channel, so it can take over all of the difference; other
    layers take over half. Channels that are always 0 stay. ``seen`` are the largest activations.
    Returns the exponents. [channels]
    """
    found = {}
    for joint in joints:
        tensors, largest = JointTensors(model, joint), seen[joint]
        given, read = tensors.given(), tensors.read()
        if largest is None:
            found[joint] = torch.zeros_like(given)
            continue
        dead = (given < _DEAD_WEIGHT) | (read < _DEAD_WEIGHT) | (largest < _DEAD_ACTIVATION)
        dead |= ~largest.isfinite()
        scale = largest
        if not tensors.is_depthwise:
            scale = largest**_SHARE / tensors.read(of_each_output=True) ** (1 - _SHARE)
        middle = scale[~dead].log2().mean() if not bool(dead.all()) else torch.zeros(())
        wanted = _exponents(scale / middle.exp2(), dead)
        exponents = wanted.clamp(-_MOST_BY_ACTIVATIONS, _MOST_BY_ACTIVATIONS)
        tensors.scale(exponents)
        found[joint] = exponents
    return found


def _exponents(scale: Tensor, dead: Tensor) -> Tensor:
    return torch.where(dead, 0.0, scale.log2().round())


class Equalize(Transform):
    """``[transform.equalize]``."""

    def __init__(self, by: str = "activations", chains: Any = "auto") -> None:
        self._by = by

    def apply(self, model: nn.Module, context: TransformContext) -> Scaled:
        chains, inventory = context.plan.chains, context._inventory
        joints = [joint for chain in chains for joint in joints_of(inventory, chain)]
        if not joints:
            return Scaled()
        probe = runnable_copy(model)
        with reads_of(probe, [joint.second.path for joint in joints]) as reads:
            context.run(probe)
        reads = of_all_ranks(reads)
        seen = {joint: _largest(reads[joint.second.path], model, joint) for joint in joints}
        if self._by == "weights":
            found = equalize_by_weights(model, joints)
        else:
            found = equalize_by_activations(model, joints, seen)
        spreads = (spread(each.site, each.reader, seen[each], found[each]) for each in joints)
        scaled = (
            replace(
                chain,
                exponents=tuple(_numbers(found[each]) for each in joints_of(inventory, chain)),
            )
            for chain in chains
        )
        return Scaled(tuple(scaled), spreads=tuple(spreads))


def _largest(read: Read, model: nn.Module, joint: Joint) -> Tensor | None:
    """The largest activation of each channel that the first layer gives. [channels]"""
    largest, channels = read.largest, JointTensors(model, joint).channels
    return None if largest is None else largest.reshape(channels, -1).amax(1)


def _numbers(exponents: Tensor) -> tuple[int, ...]:
    return tuple(map(int, exponents.tolist()))
