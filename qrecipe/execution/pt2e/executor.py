"""Programs of torch.export as an executor: observed and converted by torchao's PT2E."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import fx, nn

from qrecipe.audit.weights import looked_up
from qrecipe.errors.findings import Finding, UnsupportedError
from qrecipe.execution.isolated import Calibrate, Isolated
from qrecipe.execution.part import Compiled, Exportable, Realised, Recorded, Task, check_exportable
from qrecipe.execution.plain_scales import with_plain_scales
from qrecipe.execution.pt2e.operands import is_float, operands
from qrecipe.execution.recorded import inputs_of, recorded_graphs
from qrecipe.model.addresses import is_conversion, quantizes_tensor, site_of
from qrecipe.model.call import Inputs, bind
from qrecipe.model.copies import with_parts
from qrecipe.model.interpreter import Interpreter
from qrecipe.model.quantized import Became
from qrecipe.planning.plan import Site


def check_installed() -> None:
    """Raises ``UnsupportedError`` (QR317) without torchao."""
    if find_spec("torchao") is None:
        message = 'executor = "pt2e" needs torchao, which is not installed'
        raise UnsupportedError(Finding("QR317", message, hint="pip install 'qrecipe[pt2e]'"))


def compile(task: Task) -> Compiled:
    check_installed()
    from qrecipe.execution.pt2e.part import ProgramPart

    return Compiled(tuple(ProgramPart.of(task, part) for part in task.inventory.parts))


def isolated(task: Task, sites: Sequence[Site], calibrate: Calibrate) -> Isolated:
    check_installed()
    from qrecipe.execution.pt2e.isolated import isolated_programs

    return isolated_programs(task, sites, calibrate)


def realised_sites(converted: fx.GraphModule) -> Mapping[str, Realised]:
    found: dict[str, list[fx.Node]] = {}
    for node in converted.graph.nodes:
        name = site_of(node)
        if name is not None and is_float(node) and not is_conversion(node):
            found.setdefault(name, []).append(node)
    return {
        name: Realised(_became(nodes), nodes[0], _rounded(nodes[-1]))
        for name, nodes in found.items()
    }


def _became(nodes: Sequence[fx.Node]) -> Became:
    if _rounded(nodes[-1]) is not nodes[-1]:
        return "static"
    read = [(source, role) for node in nodes for source, role in operands(node)]
    if not any(is_conversion(source) for source, role in read if role == "weight"):
        return "weight_only" if looked_up(nodes[0]) else "float"
    rounded = [source for source, role in read if role == "data" and is_conversion(source)]
    if not rounded:
        return "weight_only"
    return "dynamic" if any(map(_finds_range, rounded)) else "static"


def _finds_range(node: fx.Node) -> bool:
    """Whether a converted tensor was rounded to a scale that is computed in each call."""
    return getattr(node.args[1], "op", "") == "call_function"


def _rounded(last: fx.Node) -> fx.Node:
    """What readers of a site's result get: the result itself, or the same dequantized."""
    quantizing = next(filter(quantizes_tensor, last.users), None)
    return last if quantizing is None else next(iter(quantizing.users))


def rebuilt(recorded: Recorded) -> nn.Module:
    check_installed()
    from qrecipe.execution.pt2e.part import rebuilt_program

    blank, graphs = recorded_graphs(recorded)
    programs = {
        part.path: rebuilt_program(graphs[part.path], inputs_of(part), recorded.plan)
        for part in recorded.architecture.parts
    }
    return with_parts(blank, programs, recorded.table.preserved_attributes)


def exportable_parts(
    recorded: Recorded, converted: Mapping[str, fx.GraphModule], inputs: Mapping[str, Inputs]
) -> Mapping[str, Exportable]:
    check_exportable(recorded.plan)
    return {path: _exportable(part, inputs[path]) for path, part in converted.items()}


def _exportable(converted: fx.GraphModule, inputs: Inputs) -> Exportable:
    """The program with one call of it, and with what it gives without rounding tensors.

    The weights of that are rounded: those of the float model are not in a file.
    """
    args = bind(converted, converted, inputs)
    with torch.no_grad():
        output = inputs.cloned().call(converted)
        as_float = _Unrounded(converted).run(*bind(converted, converted, inputs.cloned()))
    return Exportable(with_plain_scales(converted), args, output, as_float)


class _Unrounded(Interpreter):
    """Runs a program whose tensors pass conversions as they are; weights are restored."""

    def run_node(self, n: fx.Node) -> Any:
        is_of_tensor = is_conversion(n) and quantizes_tensor(n.all_input_nodes[0])
        passes = quantizes_tensor(n) or is_of_tensor
        return self.env[n.all_input_nodes[0]] if passes else super().run_node(n)
