"""The channels between two layers of a model: their weights, and how both are scaled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qrecipe.model.graph_sites import Inventory
from qrecipe.planning.chains import layer_of
from qrecipe.planning.changeable import Layer
from qrecipe.planning.plan import Chain


@dataclass(frozen=True, slots=True)
class Joint:
    """Two layers of which the second alone reads the channels of the first."""

    site: str
    reader: str
    first: Layer
    second: Layer


def joints_of(inventory: Inventory, chain: Chain) -> Iterator[Joint]:
    """The pairs of a chain, in order."""
    for site, reader in pairwise(chain.sites):
        first, second = (layer_of(inventory.matches[name]) for name in (site, reader))
        assert first is not None
        assert second is not None
        yield Joint(site, reader, first, second)


class JointTensors:
    """The tensors of a model at a joint; ``channels`` are those that the first layer gives."""

    def __init__(self, model: nn.Module, joint: Joint) -> None:
        first: Any = model.get_submodule(joint.first.path)
        self._first = first
        norm = joint.first.norm
        self._norm: Any = None if norm is None else model.get_submodule(norm)
        self._second: Any = model.get_submodule(joint.second.path)
        self.channels = len(first.weight)

    @property
    def is_depthwise(self) -> bool:
        """Whether the second layer keeps the channels apart."""
        groups = int(getattr(self._second, "groups", 1))
        return groups > 1 and int(self._second.weight.shape[1]) == 1

    def given(self) -> Tensor:
        """The largest weight of each channel in the first layer, with its BatchNorm. [channels]"""
        largest: Tensor = self._first.weight.detach().flatten(1).abs().amax(1)
        if self._norm is None:
            return largest
        deviation = (self._norm.running_var + self._norm.eps).sqrt()
        gain: Tensor = self._norm.weight.detach().abs() / deviation
        return largest * gain

    def read(self, *, of_each_output: bool = False) -> Tensor:
        """The largest weight of each channel in the second layer. [channels]

        With ``of_each_output``, weights count in parts of the largest one for the same output.
        """
        weight = self._second.weight.detach().abs()
        if of_each_output:
            own = weight.flatten(1).amax(1).clamp_min(torch.finfo(weight.dtype).tiny)
            weight = weight / own.view(-1, *[1] * (weight.dim() - 1))
        groups = int(getattr(self._second, "groups", 1))
        inputs = weight.flatten(2).amax(2) if weight.dim() > 2 else weight
        rows: Tensor = inputs.view(groups, inputs.shape[0] // groups, inputs.shape[1]).amax(1)
        return rows.reshape(self.channels, -1).amax(1)

    @torch.no_grad()
    def scale(self, exponents: Tensor) -> None:
        """Divide each channel by a power of two, and let the second layer multiply by it."""
        factor = torch.exp2(exponents.to(torch.float32))
        last = self._first if self._norm is None else self._norm
        divide_channels(last, factor)
        weight = self._second.weight
        groups = int(getattr(self._second, "groups", 1))
        read = factor.repeat_interleave(weight.shape[1] * groups // self.channels)
        rows = read.view(groups, 1, weight.shape[1]).expand(-1, weight.shape[0] // groups, -1)
        own = rows.reshape(weight.shape[0], weight.shape[1])
        weight.mul_(own.view(*own.shape, *[1] * (weight.dim() - 2)))


def divide_channels(layer: Any, factor: Tensor) -> None:
    """Let a layer or a norm give each channel divided by a factor, in place. [channels]"""
    for tensor in (layer.weight, getattr(layer, "bias", None)):
        if tensor is not None:
            tensor.div_(factor.view(-1, *[1] * (tensor.dim() - 1)))


def apply_exponents(model: nn.Module, inventory: Inventory, chains: Sequence[Chain]) -> None:
    """Scale a model's channels as chains record it, in place."""
    for chain in chains:
        joints = joints_of(inventory, chain)
        for joint, exponents in zip(joints, chain.exponents, strict=True):
            JointTensors(model, joint).scale(torch.tensor(exponents))
