"""Checks whether a model can be quantized at all, before tracing."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from types import NoneType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from qrecipe._torch_ao import QConfig
from qrecipe.errors.findings import Finding, error_from
from qrecipe.errors.spelling import did_you_mean
from qrecipe.errors.warn import warn
from qrecipe.model.graph_names import cannot_be_preserved, is_taken
from qrecipe.model.kept import PRIVATE
from qrecipe.model.quantized import quantized_part
from qrecipe.model.unfit import broken_values, check_is_model, wrapper_findings
from qrecipe.recipe.recipe import Recipe
from qrecipe.rules.resolution import listed
from qrecipe.rules.structure import joined


def check_model(model: nn.Module, recipe: Recipe) -> None:
    """Reject a model that this recipe cannot quantize, and warn about training mode (QR202).

    Raises ``PlanError`` with all problems: of the model itself (QR306), or of the attributes that
    the recipe preserves (QR301, QR314).
    """
    check_is_model(model)
    quantized = quantized_part(model)
    done = [(f"the model {quantized}", "pass the original float model")] if quantized else []
    findings = (
        [*wrapper_findings(model), *_findings(done)]
        or [
            *_findings(islice(chain(_name_faults(model), _tensor_faults(model)), 1)),
            *attribute_findings(model, recipe.fx.preserved_attributes),
        ]
        or [*broken_values(model)]
    )
    if findings:
        raise error_from(findings)
    trained = [path for path, module in model.named_modules() if _is_trained(module, path)]
    if trained and recipe.phase == "ptq":
        message = "the model is in training mode; its copy is quantized in eval mode"
        if not model.training:
            are = "is" if len(trained) == 1 else "are"
            message = f"{listed(trained)} {are} in training mode, and the quantized copy is not"
        hint = "call model.eval() first, so that you compare like with like"
        warn(Finding("QR202", message, hint=hint), recipe.lint.ignore)


_BEHAVE_OTHERWISE = (_NormBase, _DropoutNd, nn.RReLU)
"""torch's modules that compute something else in training mode."""


def _is_trained(module: nn.Module, path: str) -> bool:
    return module.training and (not path or isinstance(module, _BEHAVE_OTHERWISE))


def _findings(faults: Iterable[tuple[str, str]]) -> Iterator[Finding]:
    return (Finding("QR306", message, hint=hint) for message, hint in faults)


def _name_faults(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names that quantization needs itself, and the cure."""
    if _has_own(model, PRIVATE, dict):
        yield f"the attribute {PRIVATE} is reserved for qrecipe", "rename it"
    for path, module in model.named_modules():
        if _has_own(module, "qconfig", QConfig):
            name = joined(path, "qconfig")
            yield f"the attribute {name} is overwritten by torch's quantization", "rename it"
        for name in module._modules:
            if hasattr(nn.Module, name):
                where = f"the submodule {joined(path, name)}"
                yield f"{where} has the name of a torch.nn.Module method", "rename it"


def _tensor_faults(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Tensors that are not floats on the CPU, and the cure."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            yield f"{name} has no shape yet: it is lazy", "run the model once on an example first"
        elif tensor.is_floating_point() and tensor.dtype != torch.float32:
            dtype = str(tensor.dtype).removeprefix("torch.")
            yield (
                f"{name} is {dtype}: quantization starts from a float32 model",
                "call model.float() on it, or on a copy of it",
            )
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            yield (
                f"{name} is on meta: it has no values",
                'load the weights first: after model.to_empty(device="cpu") with load_state_dict, '
                "or at once with load_state_dict(..., assign=True)",
            )
        elif tensor.device.type != "cpu":
            yield (
                f"{name} is on {tensor.device}: the quantized kernels run on the CPU",
                'call model.to("cpu") on it, or on a copy of it',
            )


def _has_own(module: nn.Module, name: str, written: type) -> bool:
    """Whether a module has an attribute of that name that was not written by quantization."""
    value = vars(module).get(name)
    return any(name in each for each in _members(module)) or not isinstance(
        value, (written, NoneType)
    )


def attribute_findings(model: nn.Module, names: Sequence[str]) -> Iterator[Finding]:
    """``[fx] preserved_attributes`` must name values that the model holds (QR301, QR314).

    Nothing of the model is run to find out, as a property would be.
    """
    for name in names:
        if name.startswith("_") or name in _OF_EVERY_MODULE or not _holds(model, name):
            known = [own for own in vars(model) if own[0] != "_" and own not in _OF_EVERY_MODULE]
            hint = did_you_mean(name, known)
            if hint is None and hasattr(type(model), name):
                hint = "a property or method would compute with the float model: preserve a value"
            yield Finding(
                "QR301",
                f'fx.preserved_attributes "{name}" is not an attribute of the model itself',
                hint=hint,
                key="fx.preserved_attributes",
            )
        elif is_taken(name):
            yield cannot_be_preserved(name)


_OF_EVERY_MODULE = frozenset(dir(nn.Module()))


def _holds(model: nn.Module, name: str) -> bool:
    """Whether a value is kept under that name in the model or in its class."""
    if any(name in held for held in (vars(model), *_members(model))):
        return True
    of_class = inspect.getattr_static(type(model), name, property())
    return not hasattr(type(of_class), "__get__")


def _members(module: nn.Module) -> tuple[Mapping[str, Any], ...]:
    return module._modules, module._parameters, module._buffers
