"""A prepared model -> ONNX with QuantizeLinear and DequantizeLinear.

torch's exporter can only export the decomposed conversion: a graph of plain functions, quantize
and dequantize calls, without quantized modules or packed weights.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from qrecipe.artifact.carried import KEY
from qrecipe.artifact.container import path_of, write
from qrecipe.artifact.export.fusable import make_fusable
from qrecipe.artifact.export.judged import Run, Written
from qrecipe.artifact.export.onnx_check import file_findings, size_fault
from qrecipe.artifact.export.onnx_names import name_batch, name_nodes, name_outputs
from qrecipe.artifact.saving import text_of
from qrecipe.errors.findings import ArtifactError, Finding
from qrecipe.errors.text import first_line
from qrecipe.errors.warn import settle
from qrecipe.execution.batch_sizes import tried
from qrecipe.execution.joined import mark_sites
from qrecipe.execution.part import Exportable
from qrecipe.execution.provenance import Provenance
from qrecipe.model.call import Inputs
from qrecipe.model.exported import free_first_size, of_several
from qrecipe.model.nested import Packing, parts_of
from qrecipe.model.outputs import output_names, return_tensors
from qrecipe.model.tracer import OTHER_SHAPES
from qrecipe.pipeline import CompiledRecipe, exportable, origin_of
from qrecipe.process.neutral import neutral
from qrecipe.process.state import random_numbers_kept
from qrecipe.process.warnings import filters_kept, held_back
from qrecipe.runtimes.table import needing

OPSET = 20
"""Of the files; onnxruntime reads it from 1.17 on, and OpenVINO from 2024.0 on."""

ANY_BATCH = "batch"
"""Inputs whose first sizes are free."""


@neutral
def export_onnx(
    compiled: CompiledRecipe,
    prepared: nn.Module,
    path: str | os.PathLike[str],
    *,
    dynamic_shapes: Any = ANY_BATCH,
) -> None:
    """Export a calibrated or trained model to ONNX, for onnxruntime, OpenVINO and others.

    ``prepared`` is the calibrated or trained result of ``compiled.prepare()``; it stays usable.
    Inputs of the file have the sizes of the example inputs that the model was compiled for, but the
    first size, of the batch, is free. QR235 warns of a model that takes a single size. With
    ``dynamic_shapes=None`` it is that of the example inputs; anything else is passed to
    ``torch.onnx.export``.

    The file takes and returns plain tensors: dataclasses and mappings are flattened in order, and
    ``dynamic_shapes`` has one entry per tensor then. Outputs are named after their keys. Quantized
    weights are stored as integers. If onnxruntime is installed, the file is run on the example
    inputs, and on a batch of another size if that is free, and compared before it is written (QR415
    warns if that is impossible).

    Raises:
        ArtifactError: the model cannot be exported (QR512), or the file cannot be written (QR502).
        AuditError: the exported model computes something else (QR414).
        CalibrationError: ``prepared`` was not prepared by ``compiled``, or never calibrated.
        QRecipeError: the packages of the extra ``onnx`` are missing (QR602).
    """
    check_onnx()
    path_of(path, "export_onnx")
    found, ignore = exportable(compiled, prepared), compiled.recipe.lint.ignore
    write_onnx(found, origin_of(compiled), path, dynamic_shapes, ignore)


check_onnx = needing("export to ONNX", "onnx", "onnx", "onnxscript")


def write_onnx(
    found: Exportable,
    origin: Provenance,
    path: str | os.PathLike[str],
    dynamic_shapes: Any = ANY_BATCH,
    ignore: Sequence[str] = (),
) -> Written:
    """Export and compare what an executor made for exporters; errors as for `export_onnx`."""
    file = path_of(path, "export_onnx")
    content, run = checked_content(found, origin, dynamic_shapes, ignore)
    write(file, lambda stream: stream.write(content))
    return Written(run)


def checked_content(
    found: Exportable, origin: Provenance, dynamic_shapes: Any, ignore: Sequence[str]
) -> tuple[bytes, Run]:
    """The content of the file, compared with the model by a run; errors as for `export_onnx`."""
    inputs = take_tensors(found.graph_module, found.inputs)
    return_tensors(found.graph_module)
    mark_sites(found.graph_module)
    run = Run(Inputs(inputs), found.output, found.float_output)
    if dynamic_shapes == ANY_BATCH:
        content, findings = _for_any_batch(found.graph_module, run)
    else:
        content = _content(found.graph_module, run, inputs, dynamic_shapes)
        findings = list(file_findings(content, run))
    settle(findings, ignore)
    return content + _note(text_of(origin)), run


def _note(text: str) -> bytes:
    """The bytes that add a text to the metadata of a model."""
    onnx: Any = importlib.import_module("onnx")
    entry = onnx.StringStringEntryProto(key=KEY, value=text)
    note: bytes = onnx.ModelProto(metadata_props=[entry]).SerializeToString()
    return note


def _for_any_batch(model: fx.GraphModule, own: Run) -> tuple[bytes, list[Finding]]:
    """A file for batches of any size if the model takes them, with its findings."""
    try:
        content = _of_any_batch(model, own)
    except ArtifactError as error:
        content = _content(model, own, own.inputs.args, None)
        finding = Finding(
            "QR235",
            f"the exported file only takes batches of {own.inputs.batch_size}: "
            f"{error.findings[0].message}",
            hint="give example inputs of the size that it will run with",
        )
        return content, [finding, *file_findings(content, own)]
    return content, list(file_findings(content, own))


def _of_any_batch(model: fx.GraphModule, own: Run) -> bytes:
    """Raises ``ArtifactError`` (QR512) for a model that takes one size only."""
    several, other = of_several(own.inputs), own.inputs.of_another_size()
    content = _content(model, own, several.args, pytree.tree_map(free_first_size, several.args))
    why = _fixed(content)
    if why is None and other is not None:
        expected, why = tried(model, other)
        why = why or size_fault(content, own, Run(other, expected, None))
    if why is not None:
        raise ArtifactError.of("QR512", why)
    return content


def _fixed(content: bytes) -> str | None:
    """The inputs whose first size is not free."""
    model = importlib.import_module("onnx").load_from_string(content)
    shapes = {given.name: given.type.tensor_type.shape.dim for given in model.graph.input}
    fixed = [name for name, sizes in shapes.items() if len(sizes) and not sizes[0].dim_param]
    return f"the first size of {', '.join(fixed)} is fixed in the program" if fixed else None


def _content(
    model: fx.GraphModule, own: Run, inputs: tuple[Any, ...], dynamic_shapes: Any
) -> bytes:
    inputs = pytree.tree_map_only(torch.Tensor, torch.clone, inputs)  # dynamic ones get a mark
    try:
        # the exporter's libraries warn
        with random_numbers_kept(), filters_kept(), held_back([("", Warning)]):
            exported: Any = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes)
            if dynamic_shapes is not None:
                _check_sizes(model, inputs, dynamic_shapes, exported)
            flat = exported.module()
            make_fusable(flat)
            program: Any = torch.onnx.export(
                flat,
                inputs,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=dynamic_shapes,
                verbose=False,
            )
            proto = program.model_proto
            name_outputs(proto.graph, list(output_names(own.expected)))
            name_nodes(proto.graph)
            name_batch(proto.graph)
            content: bytes = proto.SerializeToString()
    except ArtifactError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        text = f"torch cannot export the model to ONNX: {first_line(cause)}"
        details = [line.strip(" -") for line in str(cause).splitlines() if line.startswith("  - ")]
        raise ArtifactError.of("QR512", text, notes=tuple(details)) from error
    return content


def _check_sizes(
    model: fx.GraphModule, inputs: tuple[Any, ...], dynamic_shapes: Any, exported: Any
) -> None:
    """Raises ``ArtifactError`` (QR512) for dynamic sizes that the graph asserts.

    torch leaves assertions out of the file. What they ask of dynamic sizes is found by an export
    without them.
    """
    without = copy.deepcopy(model)
    for node in list(without.graph.nodes):
        if node.target is torch._assert and str(node.args[1]).startswith(OTHER_SHAPES):
            without.graph.erase_node(node)
    if len(without.graph.nodes) == len(model.graph.nodes):
        return
    without.graph.eliminate_dead_code()
    without.recompile()
    plain = torch.export.export(without, inputs, dynamic_shapes=dynamic_shapes)
    asked, unasked = _conditions(exported), _conditions(plain)
    if asked != unasked:
        text = "the model's code was traced for the example's sizes, but dynamic_shapes has others"
        hint = "leave these dimensions out of dynamic_shapes, and export a file for each size"
        raise ArtifactError.of("QR512", text, hint=hint, notes=tuple(sorted(asked - unasked)))


def _conditions(program: Any) -> set[str]:
    """What an exported program asks of the sizes of its inputs."""
    ranges = {f"{symbol} in {limits}" for symbol, limits in program.range_constraints.items()}
    return ranges.union(getattr(program, "_guards_code", ()))


def take_tensors(model: fx.GraphModule, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Flatten containers that the exporter does not know into tensor inputs, in place.

    Returns the new inputs.
    """
    taken: list[Any] = []
    placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
    first = next(node for node in model.graph.nodes if node.op != "placeholder")
    for node, value in zip(placeholders, inputs, strict=True):
        if _is_known_to_exporter(value):
            taken.append(value)
            continue
        packing = Packing(value, lambda leaf: isinstance(leaf, torch.Tensor))
        taken += packing.open_leaves
        with model.graph.inserting_before(node):
            given = [
                model.graph.placeholder(f"{node.name}_{i}") for i in range(len(packing.open_leaves))
            ]
        with model.graph.inserting_before(first):
            node.replace_all_uses_with(model.graph.call_function(packing, tuple(given)))
        model.graph.erase_node(node)
    model.recompile()
    return tuple(taken)


def _is_known_to_exporter(value: Any) -> bool:
    """Whether the exporter takes an input as it is; a dict at the end would become keywords."""
    is_dict = isinstance(value, dict)
    return not is_dict and all(parts_of(leaf) is None for leaf in pytree.tree_leaves(value))
