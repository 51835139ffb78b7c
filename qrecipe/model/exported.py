"""A model's graph from torch.export, which follows Python code that no symbolic trace can.

It is written as a trace would be, so that names, rewrites, fusion and the proof that the graph
computes what the model computes are the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from qrecipe.errors.findings import Finding, TraceError
from qrecipe.errors.text import first_line
from qrecipe.model.call import VARIADIC, Inputs, arguments, signature_of
from qrecipe.model.copies import runnable_copy
from qrecipe.model.program_writer import ProgramWriter
from qrecipe.model.trace import Subject, Traced
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.process.state import unheard
from qrecipe.process.warnings import held_back, import_aside
from qrecipe.recipe.schema import FxTable


def exported_part(
    model: nn.Module, path: str, inputs: Inputs, table: FxTable, sizes: Collection[str] = ()
) -> Traced:
    """As `trace.trace_part`, with every size but the first one of each input fixed.

    Raises ``TraceError`` (QR305) if torch cannot export the submodule at ``path``.
    """
    subject = Subject.called(model, path, inputs, table)
    module = subject.module
    parameters = signature_of(module).parameters
    given = {
        name: value
        for name, value in arguments(module, of_several(inputs)).items()
        if parameters[name].kind not in VARIADIC
    }
    root = runnable_copy(module)
    try:
        program: Any = exported(root, (), given).module()
        writer = ProgramWriter(root, path, table, given, subject.fixed)
        return Traced(subject, *writer.written(program))
    except TraceError:
        raise
    except Exception as error:
        raise_lack_of_memory(error)
        what = f'"{path}"' if path else "the model"
        message = f"{what} cannot be exported: {first_line(error)}"
        hint = "move what can be exported into a submodule and name that in [fx] roots"
        raise TraceError(Finding("QR305", message, hint=hint)) from error


def exported(root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """torch's exported program, in which the first size of each tensor input is free."""
    given = signature_of(root).bind(*args, **kwargs).arguments
    return _exported(root, args, kwargs, pytree.tree_map(free_first_size, dict(given)))


def exported_as_it_is(root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """torch's exported program for inputs of these sizes alone."""
    return _exported(root, args, kwargs, None)


def _exported(root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], shapes: Any) -> Any:
    names = signature_of(root).bind(*args, **kwargs).arguments
    ordered = {name: kwargs[name] for name in names if name in kwargs}  # torch mixes up others
    import_aside("torch.fx.experimental.symbolic_shapes")  # or torch.export does
    with unheard(), held_back([("", Warning)]), torch.no_grad():
        return torch.export.export(root, tuple(args), ordered, strict=False, dynamic_shapes=shapes)


def of_several(inputs: Inputs) -> Inputs:
    """At least two samples: torch.export takes a size of 1 for a constant."""
    more = inputs.of_another_size() if inputs.batch_size == 1 else None
    return more or inputs


def free_first_size(value: Any) -> Any:
    """What torch.export is told about an input, so that its first size is free."""
    return {0: Dim.AUTO} if isinstance(value, Tensor) and value.dim() else None
