"""Copies of a model's structure that share its tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TypeVar

from torch import Tensor, nn

from qrecipe.errors.findings import Finding, PlanError

_Model = TypeVar("_Model", bound=nn.Module)


def structural_copy(model: _Model) -> _Model:
    """A deep copy of the modules that shares every parameter and buffer with ``model``.

    Raises ``PlanError`` (QR306) where the model cannot be copied.
    """
    return _copy_sharing(model, chain(model.parameters(), model.buffers()))


def runnable_copy(model: _Model) -> _Model:
    """A copy in eval mode whose forward may be run: it shares the parameters, not the buffers.

    A forward may write to a buffer, and embeddings with ``max_norm`` to their weight, which is not
    shared either. Raises ``PlanError`` (QR306) as `structural_copy` does.
    """
    written = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    }
    shared = (parameter for parameter in model.parameters() if id(parameter) not in written)
    return _copy_sharing(model, shared).eval()


def copy_around(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """A copy that shares the parameters and all of the submodules at ``paths``."""
    parts = [model.get_submodule(path) for path in paths]
    return _copy_sharing(model, [*model.parameters(), *parts])


def with_parts(model: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """A `runnable_copy` of the model with modules put in by path, under all their names.

    A part for the whole model (the empty path) is returned as it is.
    """
    if "" in parts:
        return parts[""]
    whole = runnable_copy(model)
    part_of = {whole.get_submodule(path): part for path, part in parts.items()}
    for path, module in list(whole.named_modules(remove_duplicate=False)):
        if module in part_of:
            whole.set_submodule(path, part_of[module])
    return whole


def _copy_sharing(model: _Model, shared: Iterable[Tensor | nn.Module]) -> _Model:
    """Tensors that were made in inference mode are copied: autograd takes none of them."""
    memo: dict[int, Tensor | nn.Module] = {
        id(part): part for part in shared if not _is_inference(part)
    }
    # deepcopy refuses what autograd has computed: the weight that an old-style weight_norm keeps
    memo |= {id(tensor): tensor.detach() for tensor in _computed(model)}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise PlanError(
            Finding(
                "QR306",
                f"the model cannot be copied: {error}",
                hint="make it survive copy.deepcopy; quantization works on a copy of it",
            )
        ) from error


def _is_inference(part: Tensor | nn.Module) -> bool:
    return isinstance(part, Tensor) and part.is_inference()


def _computed(model: nn.Module) -> Iterator[Tensor]:
    """Attributes of modules that hang on the graph of autograd."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                yield value
