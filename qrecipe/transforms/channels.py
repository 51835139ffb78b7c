"""The channels between two layers of a model: their ranges, and how both are scaled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qrecipe.execution.watched import inputs_watched
from qrecipe.model.graph_sites import Inventory
from qrecipe.planning.chains import layer_of
from qrecipe.planning.changeable import Layer
from qrecipe.planning.plan import Chain
from qrecipe.process import ranks


@dataclass(frozen=True, slots=True)
class Joint:
    """Two layers of which the second alone reads the channels of the first."""

    site: str
    reader: str
    first: Layer
    second: Layer


def joints_of(chain: Chain, layers: Mapping[str, Layer]) -> list[Joint]:
    """The pairs of a chain, in order."""
    return [Joint(a, b, layers[a], layers[b]) for a, b in pairwise(chain.sites)]


def layers_of(inventory: Inventory, chains: Sequence[Chain]) -> dict[str, Layer]:
    """The layers of all chains by the names of their sites."""
    names = {name for chain in chains for name in chain.sites}
    found = ((name, layer_of(inventory.matches[name])) for name in names)
    return {name: layer for name, layer in found if layer is not None}


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
        for tensor in (last.weight, last.bias):
            if tensor is not None:
                tensor.div_(factor.view(-1, *[1] * (tensor.dim() - 1)))
        weight = self._second.weight
        groups = int(getattr(self._second, "groups", 1))
        read = factor.repeat_interleave(weight.shape[1] * groups // self.channels)
        rows = read.view(groups, 1, weight.shape[1]).expand(-1, weight.shape[0] // groups, -1)
        own = rows.reshape(weight.shape[0], weight.shape[1])
        weight.mul_(own.view(*own.shape, *[1] * (weight.dim() - 2)))


def apply_exponents(model: nn.Module, chains: Sequence[Chain], layers: Mapping[str, Layer]) -> None:
    """Scale a model's channels as chains record it, in place."""
    for chain in chains:
        for joint, exponents in zip(joints_of(chain, layers), chain.exponents, strict=True):
            JointTensors(model, joint).scale(torch.tensor(exponents))


class Largest:
    """The largest absolute value of each channel that layers read, over batches."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, model: nn.Module, joints: Sequence[Joint]) -> Iterator[None]:
        """Watch one of our models inside a ``with``."""
        with ExitStack() as hooks:
            for joint in joints:
                layer: Any = model.get_submodule(joint.second.path)
                channels = JointTensors(model, joint).channels
                see = partial(self._see, joint.site, layer.weight.dim(), channels)
                hooks.enter_context(inputs_watched(layer, see))
            yield

    def _see(self, site: str, rank: int, channels: int, x: Tensor) -> None:
        """Take what a layer with weights of some rank reads into account."""
        axis = x.dim() + 1 - rank  # without the dimensions of an image
        if not x.numel():
            return
        largest = x.detach().abs().movedim(axis, 0).flatten(1).amax(1)
        largest = largest.reshape(channels, -1).amax(1)
        before = self._found.get(site)
        self._found[site] = largest if before is None else largest.maximum(before)

    def of_all_ranks(self) -> Largest:
        """What all ranks saw. Raises ``CalibrationError`` (QR409) if one of them failed."""
        merged = Largest()
        merged._found = ranks.largest("the largest values", self._found)
        return merged

    def of(self, joint: Joint) -> Tensor | None:
        """What was seen. [channels]"""
        return self._found.get(joint.site)
