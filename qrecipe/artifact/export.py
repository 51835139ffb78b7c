"""A prepared model -> ONNX: integers, scales and zero points as QuantizeLinear and its inverse.

Of torch's conversions only the decomposed one can be exported by torch's present exporter: its
graph consists of plain functions and quantize and dequantize calls, without modules and packed
weights of torch's own.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from typing import Any

import torch
from torch import fx, nn

from qrecipe._torch_ao import quiet
from qrecipe._torch_fx import convert
from qrecipe.container import path_of, problem
from qrecipe.copying import structural_copy
from qrecipe.errors import ArtifactError, Finding, QRecipeError, first_line
from qrecipe.fx.emission import erase_keep_float
from qrecipe.fx.padding import pad_explicitly
from qrecipe.fx.training import frozen_copy
from qrecipe.inputs import bind
from qrecipe.pipeline import CompiledRecipe
from qrecipe.rules import listed
from qrecipe.writing import replace_file, why_not

_PACKAGES = ("onnx", "onnxscript")
_QUANTIZE = "quantized_decomposed.quantize_per_"


def export_onnx(
    compiled: CompiledRecipe,
    prepared: nn.Module,
    path: str | os.PathLike[str],
    *,
    dynamic_shapes: Any = None,
) -> None:
    """Write a calibrated or trained model as ONNX, for onnxruntime and others.

    ``prepared`` is what ``compiled.prepare()`` gave, calibrated or trained; it stays usable. The
    model is exported on the example inputs that it was compiled for; ``dynamic_shapes`` is that of
    ``torch.onnx.export``, for inputs of other sizes. Weights are integers in the file; what was
    decided float is float.

    Raises:
        ArtifactError: the model cannot be exported (QR512), or the file cannot be written (QR502).
        CalibrationError: ``prepared`` was not prepared by ``compiled``, or never calibrated.
        QRecipeError: the packages of the extra ``onnx`` are missing (QR602).
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        text = f"export to ONNX needs {', '.join(missing)}: pip install 'qrecipe[onnx]'"
        raise QRecipeError(Finding("QR602", text))
    file = path_of(path, "export_onnx")
    model = _decomposed(compiled, prepared)
    inputs = bind(model, prepared, compiled.example_inputs)
    content = _content(model, inputs, dynamic_shapes)
    try:
        replace_file(file, content)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise problem("QR502", str(file), f"cannot be written: {why_not(error)}") from None


def _decomposed(compiled: CompiledRecipe, prepared: nn.Module) -> fx.GraphModule:
    """torch's decomposed conversion on a copy, with weights of integers."""
    compiled.check_calibrated(prepared)
    if not isinstance(prepared, fx.GraphModule):
        hint = "export needs one graph of the whole model: leave [fx] roots out"
        raise ArtifactError(Finding("QR512", "parts of a model cannot be exported", hint=hint))
    assert compiled.convert_custom_config is not None, "a graph was converted with one"
    dynamic = [site.name for site in compiled.plan.sites if site.mode == "dynamic"]
    if dynamic:
        hint = "torch's exporter knows no ranges of run time: make these sites static or float"
        text = f"dynamic sites cannot be exported: {listed(dynamic)}"
        raise ArtifactError(Finding("QR512", text, hint=hint))
    if compiled.recipe.phase == "qat":
        prepared = frozen_copy(prepared, compiled.example_inputs)
    try:
        with quiet():
            decomposed = convert(
                structural_copy(prepared),
                True,
                compiled.convert_custom_config,
                is_decomposed=True,
                backend_config=compiled.backend_config,
            )
    except Exception as error:
        raise _failed(error) from error
    pad_explicitly(decomposed)
    erase_keep_float(decomposed)
    return decomposed.eval()


def _content(model: fx.GraphModule, inputs: tuple[Any, ...], dynamic_shapes: Any) -> bytes:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own, of its libraries
            exported: Any = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes)
            flat = exported.module()
            _fold_weights(flat)
            program: Any = torch.onnx.export(
                flat, inputs, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False
            )
            content: bytes = program.model_proto.SerializeToString()
    except Exception as error:
        raise _failed(error) from error
    return content


def _fold_weights(graph_module: fx.GraphModule) -> None:
    """Store the integers of each weight in place of its float values, in place."""
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
            _spell_out(graph_module, user)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _values(graph_module: fx.GraphModule, node: fx.Node) -> list[Any]:
    return [_attribute(graph_module, arg) if isinstance(arg, fx.Node) else arg for arg in node.args]


def _attribute(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    path, _, name = str(node.target).rpartition(".")
    return getattr(graph_module.get_submodule(path), name)


def _spell_out(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Give one scale and zero point as numbers: the exporter knows no tensors of them."""
    if node.target == torch.ops.quantized_decomposed.dequantize_per_tensor.tensor:
        _, scale, zero_point, *rest = _values(graph_module, node)
        node.target = torch.ops.quantized_decomposed.dequantize_per_tensor.default
        node.args = (node.args[0], scale.item(), int(zero_point), *rest)


def _failed(error: Exception) -> ArtifactError:
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return ArtifactError(
        Finding("QR512", f"torch cannot export the model to ONNX: {first_line(cause)}")
    )
