"""Arithmetic with stored numbers for each channel of a layer: a frozen BatchNorm, a LayerScale."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qrecipe.model.addresses import family_of, members_of
from qrecipe.model.altered_modules import alteration, lacks_statistics
from qrecipe.model.nodes import (
    call_instead,
    called_modules,
    erase_unread,
    module_of,
    readers_of_values,
    stored_value,
)
from qrecipe.model.rewrites.batch_norms import FROZEN

_BatchNorm = nn.modules.batchnorm._BatchNorm
_Transposed = nn.modules.conv._ConvTransposeNd

_LINEAR: Mapping[str, tuple[Callable[..., Tensor], int]] = {
    "add": (torch.add, 2),
    "sub": (torch.sub, 2),
    "rsub": (torch.rsub, 2),
    "mul": (torch.mul, 2),
    "div": (torch.div, 1),
    "addcmul": (torch.addcmul, 3),
    "addcdiv": (torch.addcdiv, 2),
    "neg": (torch.neg, 1),
}
"""By family: functions that are linear in any single one of their first arguments, so many."""

_FACTORS = ("alpha", "value")
"""The arguments by keyword that leave them linear."""

_PERMUTATIONS = frozenset({"permute", "transpose", "movedim", "contiguous"})

_CHANNELS: Mapping[type[nn.Module], str] = {
    nn.Linear: "out_features",
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), "out_channels"),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "out_channels"),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), "num_features"),
}
"""The attribute of a layer with the number of its channels."""

_NO_EPS = 1e-30
"""Added to a variance of 1 it changes nothing; torch 2.10 does not take 0."""

_NORMS: Mapping[int, type[_BatchNorm]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
"""By the number of dimensions besides the batch and the channels."""


def fold_channel_arithmetic(
    graph_module: fx.GraphModule, patterns: Collection[Any], is_trained: bool
) -> None:
    """Fold what is computed from a layer's result and stored tensors into the layer, in place.

    Permutations may come first. A BatchNorm is folded after them, over rows that were joined, and
    after a transposed convolution that is among the ``patterns`` of the backend: torch's own method
    scales its weight as if it had the output channels of all groups. If the graph ``is_trained``,
    arithmetic with parameters that learn is left alone, and what follows a convolution becomes a
    BatchNorm, which torch fuses with it.
    """
    for node, layer in called_modules(graph_module.graph):
        shape = _shape(layer, node.meta["value"].rank)
        takes_norm = isinstance(layer, _Transposed) and type(layer) in patterns and not is_trained
        found = None if shape is None else _arithmetic(node, shape, is_trained, takes_norm)
        if found is None:
            continue
        if not is_trained:
            folded = scaled(layer, found.factor, found.shift)
            graph_module.set_submodule(str(node.target), folded)
            node.meta["members"] = (*members_of(node), *found.members)
            _remove(found.steps)
        elif isinstance(layer, nn.modules.conv._ConvNd):
            norm = _norm(_NORMS[len(layer.kernel_size)], found).to(layer.weight.dtype)
            _as_module(found, node, norm)


def _shape(layer: Any, rank: int | None) -> list[int] | None:
    """The shape of one number for each channel of a layer's result; None for other modules.

    ``rank`` is the number of dimensions of the result, if that is known.
    """
    channels = _CHANNELS.get(type(layer))
    if channels is None or not rank or alteration(layer) is not None or lacks_statistics(layer):
        return None
    is_convolution = isinstance(layer, nn.modules.conv._ConvNd)
    if is_convolution and rank != len(layer.kernel_size) + 2:  # without a batch dimension
        return None
    shape = [1] * rank
    shape[-1 if isinstance(layer, nn.Linear) else 1] = getattr(layer, channels)
    return shape


@dataclass(frozen=True, slots=True)
class _Arithmetic:
    """All of it is one linear function: ``factor * x + shift`` (channels)."""

    steps: tuple[fx.Node, ...]
    factor: Tensor
    shift: Tensor

    @property
    def members(self) -> tuple[Any, ...]:
        return tuple(member for step in self.steps for member in members_of(step))


def _arithmetic(
    node: fx.Node, shape: list[int], is_trained: bool, takes_norm: bool
) -> _Arithmetic | None:
    # a linear function is given by two of its values
    at_zero, at_one = torch.zeros(shape).double(), torch.ones(shape).double()
    steps: list[fx.Node] = []
    reads_stored = False
    source = node
    while len(readers := _readers(source)) == 1:
        (reader,) = readers
        if not is_trained and (_permutes(reader) or _joins_samples(reader, at_zero)):
            args, kwargs = reader.args[1:], reader.kwargs
            at_zero, at_one = (_called(reader)(at, *args, **kwargs) for at in (at_zero, at_one))
            source = reader
            continue
        step = _step(reader, source, is_trained)
        is_first = not steps and (takes_norm or source is not node)
        if step is None and is_first:  # else torch fuses it
            step = _norm_step(module_of(reader), at_zero)
        if step is None or step(at_zero).shape != at_zero.shape:
            break
        at_zero, at_one = step(at_zero), step(at_one)
        reads_stored |= reader.op == "call_module" or len(reader.all_input_nodes) > 1
        steps.append(reader)
        source = reader
    if not reads_stored:  # plain numbers have kernels
        return None
    return _Arithmetic(tuple(steps), (at_one - at_zero).flatten(), at_zero.flatten())


_Step = Callable[[Tensor], Tensor]
"""A call with stored tensors and numbers, as a function of the argument that is neither."""


def _step(node: fx.Node, source: fx.Node, is_trained: bool) -> _Step | None:
    """A call that is linear in what ``source`` gives; None for all others."""
    function, count = _LINEAR.get(family_of(node) or "", (torch.add, 0))
    given = [at for at, arg in enumerate(node.args) if arg is source]
    if len(given) != 1 or given[0] >= count or not node.kwargs.keys() <= set(_FACTORS):
        return None
    others = [stored_value(arg) for arg in node.args if arg is not source]
    if not all(isinstance(each, (Tensor, int, float)) for each in (*others, *node.kwargs.values())):
        return None
    tensors = [each for each in others if isinstance(each, Tensor)]
    if any(each.is_complex() or each.layout != torch.strided for each in tensors):
        return None
    if is_trained and any(each.requires_grad for each in tensors):
        return None
    numbers = [torch.as_tensor(each).double() for each in others]
    before, after = numbers[: given[0]], numbers[given[0] :]
    return lambda x: function(*before, x, *after, **node.kwargs)


def _norm_step(module: Any, at: Tensor) -> _Step | None:
    """What a BatchNorm over the same channels computes; None for another module."""
    if type(module) not in _NORMS.values() or alteration(module) or lacks_statistics(module):
        return None
    if at.dim() < 2 or at.shape[1] != module.num_features or at.numel() != at.shape[1]:
        return None
    names = ("running_mean", "running_var", "weight", "bias")
    stored = {name: getattr(module, name) for name in names}
    doubles = {name: each.detach().double() for name, each in stored.items() if each is not None}
    return partial(F.batch_norm, **doubles, eps=module.eps)


def _joins_samples(node: fx.Node, at: Tensor) -> bool:
    """Whether a call joins the dimensions before the last one, which has the channels."""
    given = node.args[1:]
    if at.numel() < 2 or at.shape[-1] != at.numel() or node.kwargs:
        return False
    if family_of(node) == "reshape":
        sizes = given[0] if len(given) == 1 else given
        return sizes in ((-1, at.shape[-1]), [-1, at.shape[-1]])
    end = given[1] if len(given) > 1 else -1
    return family_of(node) == "flatten" and isinstance(end, int) and end % at.dim() < at.dim() - 1


def _readers(source: fx.Node) -> list[fx.Node]:
    """The nodes that read values; some calls only read the shape of their second argument."""
    return [
        user
        for user in readers_of_values(source)
        if user.target not in ("reshape_as", "view_as", "expand_as") or user.args[0] is source
    ]


def _permutes(node: fx.Node) -> bool:
    """Whether a call only changes the order of dimensions, or the layout."""
    return family_of(node) in _PERMUTATIONS and len(node.all_input_nodes) == 1


def _called(node: fx.Node) -> Any:
    target: Any = node.target
    return getattr(torch.Tensor, target) if node.op == "call_method" else target


def _norm(kind: type[_BatchNorm], found: _Arithmetic) -> _BatchNorm:
    module = kind(len(found.factor), eps=_NO_EPS).eval()
    module.requires_grad_(False)
    module.weight.data, module.bias.data = found.factor, found.shift
    return module


def _as_module(found: _Arithmetic, source: fx.Node, module: nn.Module) -> None:
    """Let a module compute what all steps do, in place."""
    first, *others = found.steps
    first.meta |= {"members": found.members, FROZEN: True}
    call_instead(first, module, source)
    _remove(others)


def _remove(steps: Sequence[fx.Node]) -> None:
    """Let the readers of steps read what those read, in place."""
    for step in reversed(steps):
        (source,) = (each for each in step.all_input_nodes if each.op != "get_attr")
        unread = [each for each in step.all_input_nodes if each is not source]
        step.replace_all_uses_with(source)
        step.graph.erase_node(step)
        erase_unread(unread)


def scaled(layer: Any, factor: Tensor, shift: Tensor) -> nn.Module:
    """A copy of a layer that gives ``factor`` times its result, plus ``shift``, both (channels).

    A linear layer, a convolution or a BatchNorm in eval mode. The weight of a transposed
    convolution has the output channels of one group in its second dimension.
    """
    made: nn.Module = copy.copy(layer)
    like = layer.running_mean if layer.weight is None else layer.weight
    bias = shift if layer.bias is None else layer.bias * factor + shift
    made._parameters = {
        **layer._parameters,
        "weight": _parameter(_weight(layer, factor), like),
        "bias": _parameter(bias, like),
    }
    if isinstance(layer, _BatchNorm):
        made.affine = True  # type: ignore[assignment]
    return made


def _weight(layer: Any, factor: Tensor) -> Tensor:
    weight: Tensor | None = layer.weight
    if weight is None:
        return factor
    ones = [1] * (weight.dim() - 2)
    if isinstance(layer, _Transposed):
        by_group = factor.reshape(layer.groups, 1, -1)
        of_inputs = by_group.expand(-1, weight.shape[0] // layer.groups, -1)
        return weight * of_inputs.reshape(*weight.shape[:2], *ones)
    return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))


def _parameter(tensor: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(like.dtype), like.requires_grad)
