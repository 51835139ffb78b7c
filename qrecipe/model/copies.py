"""Copies of a model's structure that share its tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from qrecipe.model.nested import tensors_in
from qrecipe.model.plain_attributes import keep_plain_attributes, preserve_attributes
from qrecipe.model.unfit import unfit

_Model = TypeVar("_Model", bound=nn.Module)

_Part = Tensor | nn.Module | torch.ScriptObject
"""What a copy can share."""

_REGISTRIES = ("_parameters", "_buffers", "_modules")

_PACKED = ("__torch__.torch.classes.quantized.", "__torch__.torch.classes.rnn.")


def structural_copy(model: _Model) -> _Model:
    """A deep copy of the modules that shares every parameter and buffer with ``model``.

    Raises ``PlanError`` (QR306) if the model cannot be copied.
    """
    return _copy_sharing(model, chain(model.parameters(), model.buffers()))


def runnable_copy(model: _Model) -> _Model:
    """A copy in eval mode that can be run: it shares parameters and packed weights, not buffers.

    Embeddings with ``max_norm`` write to their weight, so that is not shared either. Raises
    ``PlanError`` (QR306) like `structural_copy`.
    """
    written = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    }
    shared = (parameter for parameter in model.parameters() if id(parameter) not in written)
    return _in_eval_mode(_copy_sharing(model, chain(shared, _packed(model))))


def whole_copy(model: _Model) -> _Model:
    """A deep copy, also of a model that ran with gradients and keeps what it computed.

    A pruned layer keeps its weight. Raises ``PlanError`` (QR306) like `structural_copy`.
    """
    return _copy_sharing(model, ())


def copy_around(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """A copy that shares the parameters and the submodules at ``paths``."""
    parts = [model.get_submodule(path) for path in paths]
    return _copy_sharing(model, [*model.parameters(), *parts])


def with_parts(
    model: nn.Module, parts: Mapping[str, nn.Module], preserved: Sequence[str] = ()
) -> nn.Module:
    """A `runnable_copy` of the model with the modules at some paths, and their aliases, replaced.

    The parts get the plain attributes of what they replace. A part for the whole model (the empty
    path) is returned itself, and is given the ``preserved`` attributes if it is a graph.
    Raises ``PlanError`` like `preserve_attributes`.
    """
    if "" in parts:
        preserve_attributes(model, parts[""], preserved)
        return parts[""]
    whole = runnable_copy(model)
    for path, part in parts.items():
        keep_plain_attributes(whole.get_submodule(path), part)
    part_of = {whole.get_submodule(path): part for path, part in parts.items()}
    for path, module in list(whole.named_modules(remove_duplicate=False)):
        if module in part_of:
            whole.set_submodule(path, part_of[module])
    return whole


def failing_quietly(model: _Model) -> _Model:
    """A copy's graphs, in place, without torch's traceback on stderr when one raises."""
    for module in model.modules():
        if isinstance(module, fx.GraphModule):  # each has a class of its own
            type(module).__call__ = nn.Module.__call__  # type: ignore[method-assign]
    return model


def without_weights(model: nn.Module) -> nn.Module:
    """A copy in eval mode with zeros for parameters and for buffers without values."""
    tensors = [
        *model.parameters(),
        *(tensor for tensor in _plain_tensors(model) if tensor.is_meta),
    ]
    values = {id(tensor): tensor.detach().clone() for tensor in _computed(model)}
    zeros = {id(tensor): zeros_like(tensor) for tensor in tensors}
    return _in_eval_mode(_copied(model, {**values, **zeros}))


def on_meta(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose tensors have shapes and no values."""
    tensors = [*model.parameters(), *_plain_tensors(model), *_computed(model)]
    shapes = {id(tensor): _as_shape(tensor) for tensor in tensors}
    return _in_eval_mode(_copied(model, {**{id(each): each for each in _packed(model)}, **shapes}))


def _in_eval_mode(model: _Model) -> _Model:
    """The model itself; its ``train`` may clear caches, so it is only called where it must be."""
    return model.eval() if any(module.training for module in model.modules()) else model


def _as_shape(tensor: Tensor) -> Tensor:
    if is_lazy(tensor):
        lazy: Any = type(tensor)
        return cast(Tensor, lazy(device="meta"))
    shape = tensor.detach().to("meta")
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(shape, tensor.requires_grad) if is_parameter else shape


def _packed(model: nn.Module) -> Iterator[torch.ScriptObject]:
    """The packed weights of torch's quantized modules, which nothing writes to."""
    for module in model.modules():
        for value in vars(module).values():
            if type(value) is torch.ScriptObject and value._type().qualified_name().startswith(
                _PACKED
            ):
                yield value


def _plain_tensors(model: nn.Module) -> list[Tensor]:
    """Buffers, and plain tensor attributes."""
    attributes = chain.from_iterable(vars(module).values() for module in model.modules())
    return [*model.buffers(), *(value for value in attributes if isinstance(value, Tensor))]


def zeros_like(tensor: Tensor) -> Tensor:
    """Zeros like a tensor that take the memory of one."""
    zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(zeros, tensor.requires_grad) if is_parameter else zeros


def _copy_sharing(model: _Model, shared: Iterable[_Part]) -> _Model:
    """A deep copy that shares some parts; inference tensors are cloned, for autograd."""
    memo: dict[int, _Part] = {id(part): part for part in shared if not _is_inference(part)}
    # deepcopy rejects tensors computed by autograd, such as the weight of an old-style weight_norm
    memo |= {id(tensor): tensor.detach() for tensor in _computed(model)}
    memo |= {
        id(buffer): buffer.detach().clone() for buffer in model.buffers() if not buffer.is_leaf
    }
    return _copied(model, memo)


def _is_inference(part: _Part) -> bool:
    return isinstance(part, Tensor) and not is_lazy(part) and part.is_inference()


def _copied(model: _Model, memo: dict[int, Any]) -> _Model:
    """A deep copy of a model with its own modules, except for those in ``memo``.

    Raises ``PlanError`` (QR306) if there is none.
    """
    shared = {value for value in memo.values() if isinstance(value, nn.Module)}
    inside = {each for module in shared for each in module.modules()}
    own = [module for module in model.modules() if module not in inside]
    problem: Exception | str
    try:
        copied = copy.deepcopy(model, {**empties(own), **memo})
    except Exception as error:
        problem = error
    else:
        if set(own).isdisjoint(copied.modules()):
            return copied
        problem = "its copy has the same modules"
    hint = "quantization works on a copy: make copy.deepcopy(model) work"
    cause = problem if isinstance(problem, Exception) else None
    raise unfit(f"the model cannot be copied: {problem}", hint) from cause


def empties(modules: Iterable[nn.Module]) -> dict[int, Any]:
    """New empty dicts, by the id of those that they are copies of: most of a module's are empty.

    As deepcopy's memo, they save most of its time: it copies an ordered dict like any object.
    """
    return {
        id(value): type(value)()
        for module in modules
        for value in vars(module).values()
        if _is_empty(value)
    }


def _is_empty(value: Any) -> bool:
    return type(value) in (dict, OrderedDict) and not value


def _computed(model: nn.Module) -> Iterator[Tensor]:
    """Buffers and attributes, also in containers, that are part of an autograd graph."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_modules") or _is_empty(value):
                continue
            if isinstance(value, (Tensor, dict, list, tuple)):
                yield from (tensor for tensor in tensors_in(value) if not tensor.is_leaf)


def own_tensors(
    model: nn.Module, chosen: Callable[[torch.Tensor], bool] = lambda tensor: True
) -> None:
    """Replace each chosen parameter and buffer with a clone, in place; shared ones stay shared."""
    clones: dict[int, torch.Tensor] = {}

    def own(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in clones:
            clones[id(tensor)] = tensor.detach().clone()
        return clones[id(tensor)]

    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and chosen(parameter):
                module._parameters[name] = parameters.setdefault(
                    id(parameter), nn.Parameter(own(parameter), parameter.requires_grad)
                )
        for name, buffer in module._buffers.items():
            if buffer is not None and chosen(buffer):
                module._buffers[name] = own(buffer)
    replace_in_attributes(model, {**clones, **parameters})


def replace_in_attributes(model: nn.Module, clones: Mapping[int, torch.Tensor]) -> None:
    """Replace tensors, given by id, in attributes of modules such as lists of parameters."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name in _REGISTRIES or _is_empty(value):
                continue
            if any(id(tensor) in clones for tensor in tensors_in(value)):
                vars(module)[name] = copy.deepcopy(value, dict(clones))
