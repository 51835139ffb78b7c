"""A safetensors file and the float architecture -> the converted model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qrecipe._torch_ao import quiet
from qrecipe.artifact.container import (
    Header,
    check_checksum,
    path_of,
    problem,
    read_content,
    read_header,
)
from qrecipe.artifact.metadata import Contents, contents_of, needs_of, recipe_table, stored_plan
from qrecipe.artifact.rebuilding import rebuilt
from qrecipe.artifact.state import Slot, slots_of
from qrecipe.artifact.tensors import DTYPES, deserialized
from qrecipe.artifact.value_checks import value_problems
from qrecipe.errors.findings import ArtifactError, QRecipeError
from qrecipe.errors.text import first_line
from qrecipe.errors.warn import warn
from qrecipe.execution.engine import available_engines, engine
from qrecipe.execution.executors import executor_of
from qrecipe.execution.packing import detours
from qrecipe.execution.provenance import Provenance, attach
from qrecipe.model.architecture import ArchitectureError, graph_digests
from qrecipe.model.unfit import instead_of_model, wrapper_findings
from qrecipe.planning.cpu import has_vnni
from qrecipe.planning.plan import Plan
from qrecipe.planning.target_cpu import saturation_finding, unjudged_finding
from qrecipe.process.neutral import neutral
from qrecipe.recipe.frozen import FrozenMapping
from qrecipe.recipe.schema import LintTable, RecipeTable


@neutral
def load_quantized(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Load the converted model that `save_quantized` stored; its outputs are bitwise the same.

    ``model`` is the float architecture that was quantized. Its weights don't matter and may be on
    the meta device; it is neither changed nor run. Neither data nor plugins are needed, and nothing
    in the file is executed or unpickled.

    Raises:
        ArtifactError: the file cannot be read (QR502), is incomplete (QR503), was modified (QR504),
            is not one of qrecipe's or contradicts itself (QR505), is from a newer release (QR506),
            is of another architecture (QR507), has missing or unexpected tensors (QR508) or
            impossible scales (QR509), or needs an engine that is not available (QR510).
    """
    file = path_of(path, "load_quantized")
    header = read_header(file)
    contents = contents_of(header)
    check_checksum(header, file)
    plan, recipe = stored_plan(header, contents), recipe_table(header, contents)
    _check_agreement(header, contents, plan, recipe)
    _check_engines(header, plan)
    converted = _structure(header, contents, plan, recipe, model)
    slots = slots_of(converted)
    _check_tensors(header, contents, slots)
    tensors = _tensors(header, contents, file)
    problems = value_problems(converted, slots, tensors)
    if problems:
        raise problem("QR509", header.file, f"has {problems[0]}", differences=problems[1:])
    try:
        with engine(plan.backend) if not plan.is_for_export else quiet(), quiet():
            _fill(slots, tensors, contents.aliases)
        paths = [part.path for part in contents.architecture.parts]
        elsewhere = detours(converted, plan.engines, paths)
        for slot in slots:
            chosen = elsewhere.get((slot.module, slot.attribute))
            if chosen is not None:
                with engine(chosen), quiet():
                    slot.fill(tensors)
    except (RuntimeError, ValueError, TypeError) as error:
        what = f"has weights that torch cannot pack: {first_line(error)}"
        raise problem("QR509", header.file, what) from error
    origin = Provenance(
        contents.recipe,
        contents.fingerprint,
        contents.plan,
        FrozenMapping(contents.versions),
        contents.cpu,
        contents.unjudged,
    )
    attach(converted, origin, contents.architecture)
    _warn_about_cpu(contents, recipe.lint)
    return converted


def _check_agreement(header: Header, contents: Contents, plan: Plan, recipe: RecipeTable) -> None:
    """Check that plan and architecture belong to the recipe."""
    paths = tuple(part.path for part in contents.architecture.parts)
    for what, one, other in (
        ("backend", plan.backend, recipe.backend),
        ("phase", plan.phase, recipe.phase or "ptq"),
        ("parts", paths, executor_of(plan.executor).traced_paths(recipe.fx.roots)),
    ):
        if one != other:
            raise problem("QR505", header.file, f"contradicts its recipe: {what} is {one}")


def _check_engines(header: Header, plan: Plan) -> None:
    if plan.is_for_export:
        return
    available = available_engines()
    missing = [name for name in needs_of(plan).engines if name not in available]
    if missing:
        here = ", ".join(available)
        hint = f"torch has {here} on this CPU: quantize the model for one of them"
        raise problem("QR510", header.file, f"needs the engine {', '.join(missing)}", hint)


def _structure(
    header: Header, contents: Contents, plan: Plan, recipe: RecipeTable, model: nn.Module
) -> nn.Module:
    if not isinstance(model, nn.Module):
        what, hint = instead_of_model(model)
        needs = f"needs a torch.nn.Module to load into, not {what}"
        raise problem("QR507", header.file, needs, hint)
    for finding in wrapper_findings(model):
        text = f"was not made from this model: {finding.message}"
        raise problem("QR507", header.file, text, finding.hint)
    try:
        with quiet():
            converted = rebuilt(model, contents, plan, recipe.fx)
        found = graph_digests(converted, contents.architecture)
    except ArchitectureError as error:
        raise _other_architecture(header, error.differences) from None
    except QRecipeError as error:
        raise _other_architecture(header, [f.message for f in error.findings]) from error
    except Exception as error:  # whatever torch raises for a forged plan
        raise _other_architecture(header, [first_line(error)]) from error
    if found != contents.architecture.graphs:
        saved = contents.versions.get("torch", "another")
        text = f"torch {torch.__version__} converts the plan to another graph than torch {saved}"
        raise _other_architecture(header, [text])
    return converted


def _other_architecture(header: Header, differences: Sequence[str]) -> ArtifactError:
    what = "was made from another architecture than this model"
    hint = "build the model with the code and settings that it was quantized with"
    if any("meta tensor" in difference for difference in differences):
        hint = "build the model on the CPU: its code reads a tensor that has no values on meta"
    return problem("QR507", header.file, what, hint, differences)


def _check_tensors(header: Header, contents: Contents, slots: Sequence[Slot]) -> None:
    """Check that the file has the tensors of the model, with the same dtypes and shapes."""
    own = {name: tensor for slot in slots for name, tensor in slot.tensors().items()}
    stored = {**contents.aliases, **{name: name for name in header.tensors}}
    differences = [f"{name} is missing" for name in own if name not in stored]
    differences += [f"{name} is not in the model" for name in stored if name not in own]
    for name, tensor in own.items():
        entry = header.tensors[stored[name]] if name in stored else None
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
        raise problem("QR508", header.file, what, differences=differences)


def _tensors(header: Header, contents: Contents, file: Path) -> dict[str, Tensor]:
    """Every tensor by name, including aliases, each in its own memory."""
    try:
        stored = deserialized(read_content(header, file))
    except (ValueError, MemoryError) as error:
        raise problem("QR503", header.file, f"cannot be read: {first_line(error)}") from None
    for name, order in contents.layouts.items():
        inverse = sorted(range(len(order)), key=order.__getitem__)
        stored[name] = stored[name].permute(order).contiguous().permute(inverse)
    return {**stored, **{alias: stored[name] for alias, name in contents.aliases.items()}}


def _fill(slots: Sequence[Slot], tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Put the tensors into the model; what was one object when saved is one object again."""
    parameters: dict[str, nn.Parameter] = {}
    for slot in slots:
        own = slot.value
        if isinstance(own, nn.Parameter):
            first = aliases.get(slot.name, slot.name)
            made = nn.Parameter(tensors[slot.name], own.requires_grad)
            slot.fill({slot.name: parameters.setdefault(first, made)})
        else:
            slot.fill(tensors)


def _warn_about_cpu(contents: Contents, lint: LintTable) -> None:
    if contents.unjudged:
        warn(unjudged_finding(contents.unjudged), lint.ignore)
    if contents.needs.vnni and not has_vnni():
        warn(saturation_finding(), lint.ignore)
