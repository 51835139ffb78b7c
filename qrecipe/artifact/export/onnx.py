"""A prepared model -> ONNX with QuantizeLinear and DequantizeLinear.

torch's exporter can only export the decomposed conversion: a graph of plain functions, quantize
and dequantize calls, without quantized modules or packed weights.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from qrecipe.artifact.container import path_of, write
from qrecipe.artifact.export.onnx_check import file_findings
from qrecipe.errors.findings import CODES, ArtifactError, QRecipeError, error_from
from qrecipe.errors.text import first_line
from qrecipe.errors.warn import warn
from qrecipe.execution.part import Exportable
from qrecipe.execution.plain_scales import spell_out
from qrecipe.model.nested import Packing, parts_of
from qrecipe.model.normalize import stored
from qrecipe.model.tracer import OTHER_SHAPES
from qrecipe.pipeline import CompiledRecipe, exportable
from qrecipe.process.neutral import neutral
from qrecipe.process.state import alone
from qrecipe.process.warnings import held_back

_PACKAGES = ("onnx", "onnxscript")
_QUANTIZE = "quantized_decomposed.quantize_per_"


@neutral
def export_onnx(
    compiled: CompiledRecipe,
    prepared: nn.Module,
    path: str | os.PathLike[str],
    *,
    dynamic_shapes: Any = None,
) -> None:
    """Export a calibrated or trained model to ONNX, for onnxruntime and others.

    ``prepared`` is the calibrated or trained result of ``compiled.prepare()``; it stays usable. The
    model is exported with the example inputs that it was compiled for; ``dynamic_shapes`` is passed
    to ``torch.onnx.export`` for inputs of other sizes. The file takes and returns plain tensors:
    dataclasses and mappings are flattened in order, and ``dynamic_shapes`` has one entry per tensor
    then. Quantized weights are stored as integers. If onnxruntime is installed, the file is run on
    the example inputs and compared before it is written (QR415 warns if that is impossible).

    Raises:
        ArtifactError: the model cannot be exported (QR512), or the file cannot be written (QR502).
        AuditError: the exported model computes something else (QR414).
        CalibrationError: ``prepared`` was not prepared by ``compiled``, or never calibrated.
        QRecipeError: the packages of the extra ``onnx`` are missing (QR602).
    """
    check_onnx()
    path_of(path, "export_onnx")
    write_onnx(exportable(compiled, prepared), path, dynamic_shapes, compiled.recipe.lint.ignore)


def check_onnx() -> None:
    """Raises ``QRecipeError`` (QR602) if a package of the extra ``onnx`` is missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        text = f"export to ONNX needs {', '.join(missing)}: pip install 'qrecipe[onnx]'"
        raise QRecipeError.of("QR602", text)


def write_onnx(
    found: Exportable,
    path: str | os.PathLike[str],
    dynamic_shapes: Any = None,
    ignore: Sequence[str] = (),
) -> None:
    """Export and compare what an executor made for exporters; errors as for `export_onnx`."""
    file = path_of(path, "export_onnx")
    inputs = _take_tensors(found.graph_module, found.inputs)
    content = _content(found.graph_module, inputs, dynamic_shapes)
    for finding in file_findings(content, inputs, found.output, found.float_output):
        if CODES[finding.code].error is not None:
            raise error_from([finding])
        warn(finding, ignore)
    write(file, lambda stream: stream.write(content))


def _take_tensors(model: fx.GraphModule, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
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


def _content(model: fx.GraphModule, inputs: tuple[Any, ...], dynamic_shapes: Any) -> bytes:
    inputs = pytree.tree_map_only(torch.Tensor, torch.clone, inputs)  # dynamic ones get a mark
    try:
        with alone(), held_back([("", Warning)]):  # warnings of the exporter's libraries
            exported: Any = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes)
            if dynamic_shapes is not None:
                _check_sizes(model, inputs, dynamic_shapes, exported)
            flat = exported.module()
            _fold_weights(flat)
            program: Any = torch.onnx.export(
                flat, inputs, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False
            )
            content: bytes = program.model_proto.SerializeToString()
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


def _fold_weights(graph_module: fx.GraphModule) -> None:
    """Replace the float values of each weight by its integers, in place."""
    for number, node in enumerate(list(graph_module.graph.nodes)):
        if not str(node.target).startswith(_QUANTIZE) or node.args[0].op != "get_attr":
            continue
        name = f"quantized_weight_{number}"
        with torch.no_grad():
            graph_module.register_buffer(name, node.target(*_values(graph_module, node)))
        with graph_module.graph.inserting_before(node):
            stored = graph_module.graph.get_attr(name)
        node.replace_all_uses_with(stored)
        for user in list(stored.users):
            spell_out(graph_module, user)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _values(graph_module: fx.GraphModule, node: fx.Node) -> list[Any]:
    return [stored(arg, graph_module) if isinstance(arg, fx.Node) else arg for arg in node.args]
