"""A safetensors file and the float architecture -> the converted model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields

import torch
from torch import Tensor, nn

from qrecipe._torch_ao import quiet
from qrecipe.artifact.container import StoredFile, opened, path_of, problem
from qrecipe.artifact.metadata import StoredModel, stored_model
from qrecipe.artifact.rebuilding import Constants, rebuilt
from qrecipe.artifact.saving import DTYPES
from qrecipe.artifact.value_checks import ValueChecks
from qrecipe.errors.findings import ArtifactError, QRecipeError
from qrecipe.errors.text import first_line
from qrecipe.errors.warn import warn
from qrecipe.execution.engine import available_engines, engine
from qrecipe.execution.executors import traced_paths
from qrecipe.execution.own_engines import own_engines
from qrecipe.execution.provenance import Provenance, attach
from qrecipe.execution.state import Slot, slots_of
from qrecipe.model.architecture import ArchitectureError, graph_digests
from qrecipe.model.copies import replace_in_attributes
from qrecipe.model.digest import memory_of
from qrecipe.model.unfit import instead_of_model, wrapper_findings
from qrecipe.planning.cpu import has_vnni
from qrecipe.planning.target_cpu import saturation_finding, unjudged_finding
from qrecipe.process.neutral import neutral
from qrecipe.recipe.frozen import FrozenMapping


@neutral
def load_quantized(
    path: str | os.PathLike[str], model: nn.Module, *, constants: Constants | None = None
) -> nn.Module:
    """Load the converted model that `save_quantized` stored.

    With the same version of torch, its outputs are bit-identical.

    ``model`` is the float architecture that was quantized. Its weights don't matter and may be on
    the meta device. It is neither changed nor run, though a copy may run without values, on the
    meta device. Neither data nor plugins are needed, and nothing in the file is executed or
    unpickled.

    ``constants`` are arguments of forward that are not tensors, by name, if the model was
    quantized with others than the defaults: ``{"times": 3}``, or ``{"encoder.times": 3}`` for the
    root ``encoder``. A file must not choose what the model is traced with.

    Raises:
        ArtifactError: the file cannot be read (QR502), is incomplete (QR503), was modified (QR504),
            is not one of qrecipe's or contradicts itself (QR505), is from a newer release (QR506),
            is of another architecture or was made with other constants (QR507), has missing or
            unexpected tensors (QR508) or impossible scales (QR509), or needs an engine that is not
            available (QR510).
    """
    with opened(path_of(path, "load_quantized")) as file:
        stored = stored_model(file)
        with file.damage_first():
            _check_parts(stored)
            _check_engines(stored)
            converted = _structure(stored, model, constants or {})
        tensors = _tensors_of(converted)
        _check_tensors(stored, tensors)
        file.check()
        _fill(file, stored, converted, tensors)
    contents = stored.contents
    known = {each.name: getattr(contents, each.name) for each in fields(Provenance)}
    origin = Provenance(**{**known, "versions": FrozenMapping(contents.versions)})
    attach(converted, origin, contents.architecture)
    if contents.unjudged:
        warn(unjudged_finding(contents.unjudged), stored.recipe.lint.ignore)
    if contents.needs.vnni and not has_vnni():
        warn(saturation_finding(), stored.recipe.lint.ignore)
    return converted


def _check_parts(stored: StoredModel) -> None:
    paths = tuple(part.path for part in stored.contents.architecture.parts)
    if paths != traced_paths(stored.plan.executor, stored.recipe.fx.roots):
        what = f"contradicts its recipe: the parts are {', '.join(paths)}"
        raise problem("QR505", stored.header.file, what)


def _check_engines(stored: StoredModel) -> None:
    if stored.plan.is_for_export:
        return
    available = available_engines()
    missing = [name for name in stored.contents.needs.engines if name not in available]
    if missing:
        here = ", ".join(available)
        hint = f"torch has {here} on this CPU: quantize the model for one of them"
        what = f"needs the engine {', '.join(missing)}"
        raise problem("QR510", stored.header.file, what, hint)


def _structure(stored: StoredModel, model: nn.Module, constants: Constants) -> nn.Module:
    file, contents = stored.header.file, stored.contents
    if not isinstance(model, nn.Module):
        what, hint = instead_of_model(model)
        needs = f"needs a torch.nn.Module to load into, not {what}"
        raise problem("QR507", file, needs, hint)
    for finding in wrapper_findings(model):
        text = f"was not made from this model: {finding.message}"
        raise problem("QR507", file, text, finding.hint)
    try:
        with quiet():
            converted = rebuilt(model, stored, constants)
        found = graph_digests(converted, contents.architecture)
    except ArchitectureError as error:
        raise _other_architecture(file, error.differences) from None
    except ArtifactError:
        raise
    except QRecipeError as error:
        raise _other_architecture(file, [f.message for f in error.findings]) from error
    except Exception as error:  # whatever torch raises for a forged plan
        raise _other_architecture(file, [first_line(error)]) from error
    if found != contents.architecture.graphs:
        raise _other_architecture(file, [_other_graph(contents.versions.get("torch", "another"))])
    return converted


def _other_graph(saved: str) -> str:
    if saved == torch.__version__:
        return "the plan becomes another graph, as when parameters that were tied no longer are"
    return f"torch {torch.__version__} converts the plan to another graph than torch {saved}"


_SAME_CODE = "build the model with the code and settings that it was quantized with"


def _other_architecture(
    file: str, differences: Sequence[str], hint: str = _SAME_CODE
) -> ArtifactError:
    what = "was made from another architecture than this model"
    if differences and all(
        each.endswith("in the file, nothing in the model") for each in differences
    ):
        hint = f"{hint}; if it makes layers on its first call, run it once on an example first"
    if any("meta tensor" in difference for difference in differences):
        hint = "build the model on the CPU: its code reads a tensor that has no values on meta"
    return problem("QR507", file, what, hint, differences)


_Slots = Mapping[Slot, Mapping[str, Tensor]]
"""The state of a model with its names, dtypes and shapes; the tensors are on the meta device."""


def _tensors_of(converted: nn.Module) -> _Slots:
    return {
        slot: {name: tensor.to("meta") for name, tensor in slot.tensors().items()}
        for slot in slots_of(converted)
    }


def _fill(file: StoredFile, stored: StoredModel, converted: nn.Module, slots: _Slots) -> None:
    """Put the tensors of the file into the model, one after another.

    What was one object when saved is one object again.
    """
    elsewhere = own_engines(converted)
    checks, shared = ValueChecks(converted), dict[str, Tensor]()

    def fill(slot: Slot, names: Iterable[str]) -> list[str]:
        """What is wrong with the tensors of a slot; it is filled if that is nothing."""
        tensors = {name: _tensor(file, stored, name) for name in names}
        problems = list(checks.problems(slot, tensors))
        if problems:
            return problems
        if slot.kind == "tensor":
            first = stored.contents.aliases.get(slot.name, slot.name)
            tensors[slot.name] = shared.setdefault(first, slot.like(tensors[slot.name]))
        chosen = elsewhere.get(slot.module)
        with nullcontext() if chosen is None else engine(chosen):
            slot.fill(tensors)
        return []

    former = {slot: slot.value for slot in slots if slot.kind == "tensor"}
    backend = stored.plan.backend
    try:
        with quiet(), nullcontext() if stored.plan.is_for_export else engine(backend):
            problems = [text for slot, own in slots.items() for text in fill(slot, own)]
    except (RuntimeError, ValueError, TypeError) as error:
        what = f"has weights that torch cannot pack: {first_line(error)}"
        raise problem("QR509", file.header.file, what) from error
    if problems:
        raise problem("QR509", file.header.file, f"has {problems[0]}", differences=problems[1:])
    replace_in_attributes(converted, {id(value): slot.value for slot, value in former.items()})


def _check_tensors(stored: StoredModel, slots: _Slots) -> None:
    """Check that the file has the tensors of the model, with the same dtypes and shapes."""
    own = {name: tensor for tensors in slots.values() for name, tensor in tensors.items()}
    table = stored.header.tensors
    places = {**stored.contents.aliases, **{name: name for name in table}}
    differences = [f"{name} is missing" for name in own if name not in places]
    differences += [f"{name} is not in the model" for name in places if name not in own]
    for name, tensor in own.items():
        entry = table[places[name]] if name in places else None
        if entry is not None and (DTYPES[entry.dtype], entry.shape) != (
            tensor.dtype,
            tensor.shape,
        ):
            differences.append(
                f"{name} is {entry.dtype} {list(entry.shape)} in the file, but "
                f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} in the model"
            )
    if differences:
        what = "does not have the tensors of this model"
        raise problem("QR508", stored.header.file, what, differences=differences)


def _tensor(file: StoredFile, stored: StoredModel, name: str) -> Tensor:
    """A tensor by its name or its alias, in its own memory."""
    name = stored.contents.aliases.get(name, name)
    entry = file.header.tensors[name]
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    file.read_tensor(name, memory_of(tensor))
    order = stored.contents.layouts.get(name)
    if order is None:
        return tensor
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(inverse)
