"""A converted program -> a ``.pt2`` file of torch.export, which runs without qrecipe."""

from __future__ import annotations

import io
import os
from typing import Any

import torch
from torch import fx, nn

from qrecipe.artifact.container import path_of, write
from qrecipe.artifact.plain_scales import spell_out
from qrecipe.errors.findings import ArtifactError, AuditError, Finding
from qrecipe.errors.text import first_line
from qrecipe.execution.provenance import converted_graphs
from qrecipe.model.call import Inputs
from qrecipe.model.copies import runnable_copy
from qrecipe.model.exported import exported, of_several
from qrecipe.model.nested import tensors_in
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.process.neutral import neutral


@neutral
def export_pt2(converted: nn.Module, path: str | os.PathLike[str], example_inputs: Any) -> None:
    """Write a model that PT2E converted as a file of torch.export, for torch and its compilers.

    ``example_inputs`` are as for `qrecipe.plan`; the first dimension of each input is free in the
    file, other sizes are theirs. Weights are stored as integers, and scales as numbers. The example
    inputs are not stored: to compile the file with ``torch._inductor.aoti_compile_and_package``,
    set ``example_inputs`` of the loaded program to ``(args, kwargs)``. The file is loaded and
    compared with the model before it is written: on the example inputs, both give the same bits.

    Raises:
        ArtifactError: the model was not converted by qrecipe (QR501) or not as a program (QR512),
            or the file cannot be written (QR502).
        AuditError: the file gives other results (QR414).
    """
    file = path_of(path, "export_pt2")
    graphs = converted_graphs(converted)
    if not all(map(_is_program, graphs.values())) or "" not in graphs:
        message = "only a whole model that PT2E converted is a program of torch.export"
        hint = 'quantize it with executor = "pt2e", and without [fx] roots'
        raise ArtifactError(Finding("QR512", message, hint=hint))
    inputs = of_several(Inputs.from_batch(example_inputs))
    content = _content(converted, inputs)
    program = torch.export.load(io.BytesIO(content)).module()
    with torch.no_grad():
        pairs = zip(
            tensors_in(inputs.cloned().call(converted)),
            tensors_in(inputs.cloned().call(program)),
            strict=True,
        )
        is_same = all(torch.equal(one, other) for one, other in pairs)
    if not is_same:
        raise AuditError(Finding("QR414", "the file gives other results than the model"))
    write(file, lambda stream: stream.write(content))


def _is_program(graph_module: fx.GraphModule) -> bool:
    return any(
        str(node.target).startswith("quantized_decomposed.") for node in graph_module.graph.nodes
    )


_NOTES = ("from_node", "nn_module_stack", "stack_trace")
"""What torch notes of where an operator comes from: half of a program without its tensors."""


def _with_plain_scales(converted: nn.Module) -> fx.GraphModule:
    """A copy as torch's compilers know it, without the tensors of its scales."""
    made = runnable_copy(converted)
    assert isinstance(made, fx.GraphModule)
    for node in made.graph.nodes:
        spell_out(made, node)
    made.graph.eliminate_dead_code()
    return fx.GraphModule(made, made.graph)


def _content(converted: nn.Module, inputs: Inputs) -> bytes:
    stream = io.BytesIO()
    try:
        program = exported(_with_plain_scales(converted), inputs.args, inputs.kwargs)
        program.example_inputs = None
        for node in program.graph.nodes:
            for note in _NOTES:
                node.meta.pop(note, None)
        torch.export.save(program, stream)
    except Exception as error:
        raise_lack_of_memory(error)
        message = f"torch cannot export the program: {first_line(error)}"
        raise ArtifactError(Finding("QR512", message, hint="report the model")) from error
    return stream.getvalue()
