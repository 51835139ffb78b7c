"""A converted program -> a ``.pt2`` file of torch.export, which runs without qrecipe."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import torch
from torch import nn

from qrecipe.artifact.carried import KEY
from qrecipe.artifact.container import path_of, write
from qrecipe.artifact.export.judged import Run, Written
from qrecipe.artifact.export.program import Program, Sizes, for_sizes
from qrecipe.artifact.saving import text_of
from qrecipe.errors.findings import ArtifactError, AuditError, Finding
from qrecipe.errors.text import first_line
from qrecipe.model.call import Inputs
from qrecipe.model.nested import tensors_in
from qrecipe.process.neutral import neutral


@neutral
def export_pt2(
    converted: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    dynamic_shapes: Sizes = "batch",
) -> None:
    """Write a model that PT2E converted as a file of torch.export, for torch and its compilers.

    ``example_inputs`` are as for `qrecipe.plan`; the first dimension of each input is free in the
    file, or theirs with ``dynamic_shapes=None``, as other sizes are. Weights are stored as
    integers, and scales as numbers. The example inputs are not stored: to compile the file with
    ``torch._inductor.aoti_compile_and_package``, set ``example_inputs`` of the loaded program to
    ``(args, kwargs)``. The file is loaded and compared with the model before it is written: on the
    example inputs, both give the same bits.

    Raises:
        ArtifactError: the model was not converted by qrecipe (QR501) or not as a program (QR512),
            it takes or returns containers that torch cannot store (QR512), or the file cannot be
            written (QR502).
        AuditError: the file gives other results (QR414).
    """
    write_pt2(converted, path_of(path, "export_pt2"), example_inputs, dynamic_shapes)


def write_pt2(converted: nn.Module, file: Path, example_inputs: Any, sizes: Sizes) -> Written:
    """As `export_pt2`."""
    program = Program.of(converted, for_sizes(Inputs.from_batch(example_inputs), sizes))
    content = _content(program, text_of(program.origin), sizes)
    loaded = torch.export.load(io.BytesIO(content)).module()
    with torch.no_grad():
        found = program.inputs.cloned().call(loaded)
    expected = program.output()
    pairs = zip(tensors_in(expected), tensors_in(found), strict=True)
    if not all(torch.equal(one, other) for one, other in pairs):
        raise AuditError(Finding("QR414", "the file gives other results than the model"))
    write(file, lambda stream: stream.write(content))
    return Written(Run(program.inputs, expected, None))


_NOTES = ("from_node", "nn_module_stack", "stack_trace")
"""What torch notes of where an operator comes from: half of a program without its tensors."""


def _content(program: Program, text: str, sizes: Sizes) -> bytes:
    exported = program.exported(sizes)
    exported.example_inputs = None
    for node in exported.graph.nodes:
        for note in _NOTES:
            node.meta.pop(note, None)
    stream = io.BytesIO()
    try:
        torch.export.save(exported, stream, extra_files={f"{KEY}.json": text})
    except NotImplementedError as error:  # containers of classes that another process would need
        message = f"torch cannot store the program: {first_line(error)}"
        hint = "let the model take and return tuples, lists and dicts, or register the class"
        raise ArtifactError(Finding("QR512", message, hint=hint)) from error
    return _compressed(stream.getvalue())


def _compressed(archive: bytes) -> bytes:
    """The same archive with its JSON compressed, which torch reads as well."""
    stream = io.BytesIO()
    with ZipFile(io.BytesIO(archive)) as source, ZipFile(stream, "w") as made:
        for entry in source.infolist():
            kind = ZIP_DEFLATED if entry.filename.endswith(".json") else ZIP_STORED
            made.writestr(ZipInfo(entry.filename), source.read(entry), kind)
    return stream.getvalue()
