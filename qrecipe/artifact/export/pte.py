"""A converted program -> a ``.pte`` file of ExecuTorch, whose kernels are those of XNNPACK."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe._torch_ao import quiet
from qrecipe.artifact.carried import KEY
from qrecipe.artifact.container import path_of, write
from qrecipe.artifact.export.deviations import Deviation, at_ties, differing
from qrecipe.artifact.export.integers import in_integers
from qrecipe.artifact.export.judged import Run, Written
from qrecipe.artifact.export.lowering import Lowering, judged_apart, layers_of, results_apart
from qrecipe.artifact.export.program import Program, Sizes
from qrecipe.artifact.saving import text_of
from qrecipe.audit.sample import JUDGEABLE_DB, RIGHT_DB
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import ArtifactError, AuditError, Finding
from qrecipe.errors.text import shown, shown_names
from qrecipe.errors.warn import settle
from qrecipe.model.addresses import quantizes_tensor, site_of
from qrecipe.model.call import Inputs, bound
from qrecipe.model.exported import exported_as_it_is
from qrecipe.model.nested import map_tensors, tensors_in
from qrecipe.process.memory import failing_as
from qrecipe.process.neutral import neutral
from qrecipe.process.state import unheard
from qrecipe.process.warnings import held_back
from qrecipe.runtimes import executorch

_BACKEND = "executorch"


@neutral
def export_pte(
    converted: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    dynamic_shapes: Sizes = "batch",
) -> None:
    """Write a model that PT2E converted for the backend ``executorch`` as a file of ExecuTorch.

    ``example_inputs`` are as for `qrecipe.plan`. Of several samples, the file takes one to as many,
    or with ``dynamic_shapes=None`` only as many, which may be faster; it takes other sizes, and a
    single sample, as they are. Its operators are those of XNNPACK,
    which computes in integers. The file takes and returns tensors: containers are flattened in
    order, keywords in that of the signature. It is loaded in ExecuTorch's runtime and compared
    before it is written: it gives the bits of the model, or of the model computed in integers. If
    some operators compute in float, which differs in the last place, each other site alone does.

    Raises:
        ArtifactError: the model was not converted by qrecipe (QR501), or not as a program or for
            another backend (QR512), or the file cannot be written (QR502).
        AuditError: a layer stays outside of XNNPACK (QR410), or the file computes something else
            (QR411, QR412).
        QRecipeError: ExecuTorch is missing (QR602).
    """
    write_pte(converted, path_of(path, "export_pte"), example_inputs, dynamic_shapes)


def write_pte(converted: nn.Module, file: Path, example_inputs: Any, sizes: Sizes) -> Written:
    """As `export_pte`."""
    executorch.check_installed()
    program = Program.of(converted, _dense(Inputs.from_batch(example_inputs)))
    if program.plan.backend != _BACKEND:
        message = f"the model is for {program.plan.backend}, whose integers XNNPACK does not have"
        hint = f'quantize it with backend = "{_BACKEND}"'
        raise ArtifactError(Finding("QR512", message, hint=hint))
    _check_dimensions(program)
    _return_leaves(program.graph_module)
    _separate_readers(program.graph_module)
    layers = list(layers_of(program.graph_module))
    started = time.perf_counter()
    edge = _lowered(program.exported(sizes), {KEY: text_of(program.origin)})
    left = set(edge.exported_program().graph_signature.inputs_to_buffers.values())
    outside = [site_of(layer) or "" for layer in layers if _weight_of(layer) in left]
    if outside:
        message = f"XNNPACK does not take {shown_names(outside)}"
        hint = "leave operations without a kernel float, by rules"
        raise AuditError(Finding("QR410", message, hint=hint))
    content = _content(edge)
    seconds = time.perf_counter() - started
    found = _run(content, program.inputs)
    exact, deviations = _compared(program, found)
    write(file, lambda stream: stream.write(content))
    lowering = Lowering("XNNPACK", len(layers), (), seconds, deviations, exact)
    return Written(Run(program.inputs, found, None), lowering)


def _compared(program: Program, found: Sequence[Tensor]) -> tuple[bool, tuple[Deviation, ...]]:
    """Whether a file gives the bits of the program, and the sites that do not, see `Lowering`.

    Raises ``AuditError`` if one computes something else (QR411), or the whole does (QR412).
    """
    if _same(list(tensors_in(program.output())), found):
        return True, ()
    expected = in_integers(program.graph_module, program.inputs)
    exact = list(results_apart(program, in_integers))
    if _same(expected, found):
        return True, differing(exact)
    compiled = list(results_apart(program, _computed))
    pairs = zip(compiled, exact, strict=True)
    judged = [replace(each, expected=integers.found) for each, integers in pairs]
    settle(judged_apart(judged, at_ties), ())
    reached = output_sqnr_db(expected, list(found))
    least = JUDGEABLE_DB if any(each.differs for each in judged) else RIGHT_DB
    if reached is not None and not reached >= least:
        message = f"the file is {reached:.1f} dB from the model, but no site of it alone"
        raise AuditError(Finding("QR412", message, hint="report the model"))
    return False, differing(compiled)


def _same(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    return len(expected) == len(found) and all(map(torch.equal, expected, found))


def _check_dimensions(program: Program) -> None:
    """Raises ``ArtifactError`` (QR512) for an input without dimensions that XNNPACK would round.

    A pass of ExecuTorch takes the first element of what is rounded.
    """
    given = bound(program.graph_module, program.inputs).arguments
    for node in program.graph_module.graph.find_nodes(op="placeholder"):
        name = str(node.target)
        value = given[name]
        rounded = next(filter(quantizes_tensor, node.users), None)
        if isinstance(value, Tensor) and not value.dim() and rounded is not None:
            reader = next(iter(next(iter(rounded.users)).users))
            text = f"XNNPACK has no integers for {shown(name)}, a tensor without dimensions"
            hint = f"pass {name}.reshape(1), or leave {site_of(reader)} float, by a rule"
            raise ArtifactError(Finding("QR512", text, hint=hint))


def _weight_of(layer: fx.Node) -> str:
    """The name of a layer's stored integers."""
    _, dequantized = layer.all_input_nodes[:2]
    return str(dequantized.all_input_nodes[0].target)


def _return_leaves(graph_module: fx.GraphModule) -> None:
    """Return tensors without containers, in place: a file has none, and torch knows not all."""
    (output,) = graph_module.graph.find_nodes(op="output")
    (result,) = output.args
    if isinstance(result, fx.Node) and result.op == "call_module":
        output.args = (tuple(leaf for leaf in result.args if isinstance(leaf, fx.Node)),)
        graph_module.graph.erase_node(result)
    graph_module.recompile()


def _separate_readers(graph_module: fx.GraphModule) -> None:
    """Give each reader of a dequantized tensor an operator of its own, in place.

    ExecuTorch puts the operator into one of its readers' partitions. Others then depend on that
    partition, also where it depends on them: a layer that is called twice, with another in between.
    """
    for node in list(graph_module.graph.nodes):
        if ".dequantize_per_" in str(node.target):
            for user in list(node.users)[1:]:
                with graph_module.graph.inserting_after(node):
                    user.replace_input_with(node, graph_module.graph.node_copy(node))
    graph_module.recompile()


def _lowered(exported: Any, constants: Mapping[str, str] | None = None) -> Any:
    with _of_executorch():
        return executorch.lowered(exported, constants)


def _content(lowered: Any) -> bytes:
    with _of_executorch():
        return bytes(lowered.to_executorch().buffer)


@contextmanager
def _of_executorch() -> Iterator[None]:
    """Let ExecuTorch work quietly. What it raises is an ``ArtifactError`` (QR512)."""
    what = "ExecuTorch cannot take the program"
    with (
        failing_as(ArtifactError, "QR512", what, "report the model"),
        unheard(),
        quiet(),
        held_back([("", Warning)]),
    ):
        yield


def _run(content: bytes, inputs: Inputs) -> list[Tensor]:
    found = executorch.open_file(content, 1).run(inputs)
    return [each.clone() for each in found]


def _computed(graph_module: fx.GraphModule, inputs: Inputs) -> list[Tensor]:
    dense = _dense(inputs)
    content = _content(_lowered(exported_as_it_is(graph_module, dense.args, {})))
    return _run(content, dense)


def _dense(inputs: Inputs) -> Inputs:
    """The inputs in a memory format that ExecuTorch has."""
    args, kwargs = map_tensors(_in_known_format, (inputs.args, dict(inputs.kwargs)))
    return Inputs(args, kwargs)


def _in_known_format(x: Tensor) -> Tensor:
    is_image = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if is_image else x.contiguous()
