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
from qrecipe.planning.changeable import Layer
from qrecipe.planning.plan import Chain
from qrecipe.transforms.base import Scaled, Transform, TransformContext
from qrecipe.transforms.channels import Joint, JointTensors, Largest, joints_of, layers_of
from qrecipe.transforms.record import Spread, spread_of

_ROUNDS = 3
"""Each scale by weights changes those next to it."""

_MOST_BY_WEIGHTS = 10
_MOST_BY_ACTIVATIONS = 6
"""The largest exponents."""

_SHARE = 0.5
"""How much of the difference between channels the weights take over."""

_DEAD_WEIGHT = 1e-10
_DEAD_ACTIVATION = 1e-6


def equalize_by_weights(
    model: nn.Module, chains: Sequence[Chain], layers: Mapping[str, Layer]
) -> dict[Joint, Tensor]:
    """Scale a model's channels in place so that both layers have the same range in each.

    Returns the exponents by joint. [channels]
    """
    joints = [joint for chain in chains for joint in joints_of(chain, layers)]
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
    model: nn.Module, chains: Sequence[Chain], layers: Mapping[str, Layer], largest: Largest
) -> dict[Joint, Tensor]:
    """Scale a model's channels in place so that activations differ less between channels.

    A depthwise layer has a scale for each channel, so it can take over all of the difference; other
    layers take over half. Channels that are always 0 stay. Returns the exponents. [channels]
    """
    found = {}
    for joint in (joint for chain in chains for joint in joints_of(chain, layers)):
        tensors, seen = JointTensors(model, joint), largest.of(joint)
        given, read = tensors.given(), tensors.read()
        if seen is None:
            found[joint] = torch.zeros_like(given)
            continue
        dead = (given < _DEAD_WEIGHT) | (read < _DEAD_WEIGHT) | (seen < _DEAD_ACTIVATION)
        dead |= ~seen.isfinite()
        scale = seen
        if not tensors.is_depthwise:
            scale = seen**_SHARE / tensors.read(of_each_output=True) ** (1 - _SHARE)
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
        if not chains:
            return Scaled()
        layers = layers_of(inventory, chains)
        joints = [joint for chain in chains for joint in joints_of(chain, layers)]
        seen, probe = Largest(), runnable_copy(model)
        with seen.watching(probe, joints):
            context.run(probe)
        seen = seen.of_all_ranks()
        if self._by == "weights":
            exponents = equalize_by_weights(model, chains, layers)
        else:
            exponents = equalize_by_activations(model, chains, layers, seen)
        spreads = (_spread(joint, seen.of(joint), exponents[joint]) for joint in joints)
        return Scaled(
            tuple(_with_exponents(chain, layers, exponents) for chain in chains),
            spreads=tuple(spreads),
        )


def _spread(joint: Joint, largest: Tensor | None, exponents: Tensor) -> Spread:
    after = None if largest is None else largest / exponents.exp2()
    return Spread(joint.site, joint.reader, spread_of(largest), spread_of(after))


def _with_exponents(
    chain: Chain, layers: Mapping[str, Layer], exponents: Mapping[Joint, Tensor]
) -> Chain:
    found = (exponents[joint] for joint in joints_of(chain, layers))
    return replace(chain, exponents=tuple(tuple(map(int, each.tolist())) for each in found))
