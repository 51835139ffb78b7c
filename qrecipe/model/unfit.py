"""What cannot be quantized as it is: non-models, wrapped models, weights with NaN."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.nn.parameter import is_lazy

from qrecipe.errors.findings import Finding, PlanError
from qrecipe.errors.text import quoted_whole
from qrecipe.rules.resolution import listed
from qrecipe.rules.structure import joined

_OF_WRAPPERS: Mapping[str, str] = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
}
"""The attribute with the wrapped model, by torch's wrapper class."""

_SESSIONS = ("InferenceSession", "CompiledModel")
"""Classes of onnxruntime and openvino."""


_SOURCE = 'pass the model that was exported; executor = "pt2e" exports it by itself'


def check_is_model(model: object) -> None:
    """Raises ``PlanError`` (QR306) for anything but a module."""
    if isinstance(model, nn.Module):
        return
    what, hint = instead_of_model(model)
    raise unfit(f"the model is {what}, not a torch.nn.Module", hint)


def unfit(message: str, hint: str, *notes: str) -> PlanError:
    """The error (QR306) for a model that cannot be quantized as it is."""
    return PlanError.of("QR306", message, hint=hint, notes=notes)


def instead_of_model(given: Any) -> tuple[str, str]:
    """What was passed instead of a module, and how to get one."""
    kind = type(given).__name__
    if isinstance(given, type):
        return f"the class {given.__name__}", "pass an instance of it"
    if isinstance(given, Mapping):
        return _of_mapping(given)
    if isinstance(given, (str, os.PathLike)):
        load = "create the model, then model.load_state_dict(torch.load(path))"
        return f"a path ({kind})", f"load it first: {load}"
    if isinstance(given, (tuple, list)) and any(isinstance(part, nn.Module) for part in given):
        index = next(i for i, part in enumerate(given) if isinstance(part, nn.Module))
        return f"a {kind} with a model in it", f"pass its element {index}"
    if kind == "ExportedProgram":
        return "a program of torch.export", _SOURCE
    if kind in _SESSIONS:
        return (
            f"a session of another runtime ({kind})",
            "pass its float model",
        )
    if callable(given):
        return f"a {kind}", "if it creates the model, call it and pass the result"
    return f"a {kind}", "pass the model to quantize"


def _of_mapping(given: Mapping[Any, Any]) -> tuple[str, str]:
    """A checkpoint, or what is in one."""
    kind = type(given).__name__
    for key, value in given.items():
        if isinstance(value, nn.Module):
            return f"a {kind} with a model in it", f"pass its element {key!r}"
    for key, value in given.items():
        if _is_state_dict(value):
            load = f"create the model, then model.load_state_dict(checkpoint[{key!r}])"
            return f"a {kind} with a state_dict in it", load
    if _is_state_dict(given):
        return f"a state_dict ({kind})", "create the model, then model.load_state_dict(state_dict)"
    return f"a {kind}", "pass the model to quantize"


def _is_state_dict(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(tensor, Tensor) for tensor in value.values())
    )


def wrapper_findings(model: nn.Module) -> Iterator[Finding]:
    """Modules that are wrapped, compiled or exported, so that they are opaque (QR306)."""
    if _is_program(model):
        yield Finding("QR306", "the model is a program of torch.export", hint=_SOURCE)
        return
    for path, module in model.named_modules():
        where = path or "the model"
        if isinstance(module, torch.jit.ScriptModule):
            hint = "put the original back" if path else "pass the original model"
            yield Finding("QR306", f"{where} is TorchScript and cannot be traced again", hint=hint)
            return
        kind = type(module)
        held = _OF_WRAPPERS.get(kind.__name__) if kind.__module__.startswith("torch.") else None
        if held is not None:
            hint = f"pass model.{held}"
            if path:
                name = quoted_whole(path)
                original = f"model.get_submodule({name}).{held}"
                hint = f"put the original back: model.set_submodule({name}, {original})"
            yield Finding("QR306", f"{where} is wrapped in torch's {kind.__name__}", hint=hint)


def _is_program(model: nn.Module) -> bool:
    """Whether a model is what torch.export made of one: aten operators instead of modules."""
    if type(model).__name__ == "UnflattenedModule":
        return True
    if not isinstance(model, fx.GraphModule):
        return False
    calls_modules = any(
        node.target != "_guards_fn" for node in model.graph.find_nodes(op="call_module")
    )
    called = {node.target for node in model.graph.nodes if node.op == "call_function"}
    operators = [each for each in called if isinstance(each, OpOverload)]
    return not calls_modules and any(each.namespace == "aten" for each in operators)


def broken_values(model: nn.Module) -> Iterator[Finding]:
    """Parameters and statistics with NaN or infinity (QR306).

    Other buffers may contain infinity on purpose, such as attention masks.
    """
    names = [
        joined(path, name)
        for path, module in model.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and must_be_finite(module, name) and not _is_finite(tensor)
    ]
    if names:
        yield Finding(
            "QR306",
            f"NaN or infinity in {listed(names)}",
            hint="the float model has them too: did its training diverge? load an earlier "
            "checkpoint",
        )


def must_be_finite(module: nn.Module, name: str) -> bool:
    """Whether an attribute of a module is a parameter or a statistic."""
    if name in module._buffers:
        return type(module).__module__.startswith("torch.nn") or name.startswith("running_")
    return name in module._parameters


def _is_finite(tensor: Tensor) -> bool:
    if is_lazy(tensor) or not tensor.is_floating_point() or tensor.device.type == "meta":
        return True
    if tensor.layout != torch.strided:
        return True
    return all_finite(tensor)


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor has neither NaN nor infinity."""
    with torch.no_grad():
        # the sum is quick, but may overflow
        return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


_CONTAINERS: Mapping[type, str] = {list: "ModuleList", tuple: "ModuleList", dict: "ModuleDict"}


def hidden_modules(model: nn.Module) -> tuple[str, str] | None:
    """A list or dict that hides modules from torch: what it is, and how to fix it."""
    registered = set(model.modules())
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            container = _CONTAINERS.get(type(value))
            if container is None or name in _OF_EVERY_MODULE:
                continue
            held = value.values() if isinstance(value, dict) else value
            if any(isinstance(part, nn.Module) and part not in registered for part in held):
                kind = type(value).__name__
                return (
                    f"{joined(path, name)} is a plain {kind}, so the modules in it are not "
                    "submodules of the model",
                    f"make it a torch.nn.{container}, so that they are saved and quantized",
                )
    return None


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
