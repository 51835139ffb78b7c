"""Exportable parts of a model and the code around them, as one exportable graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from qrecipe.errors.findings import ArtifactError
from qrecipe.execution.part import Exportable
from qrecipe.model.addresses import TRACE_PREFIX, site_of
from qrecipe.model.call import Inputs, bind
from qrecipe.model.copies import runnable_copy, with_parts
from qrecipe.model.exported import exported, of_several
from qrecipe.model.nested import map_leaves
from qrecipe.process.memory import failing_as
from qrecipe.process.state import alone


def joined(
    around: nn.Module,
    parts: Mapping[str, Exportable],
    inputs: Inputs,
    as_float: nn.Module | None,
) -> Exportable:
    """The whole model, whose own code torch.export has to follow.

    ``inputs`` are those of the model; ``as_float`` is the model itself, if that was not trained.

    Raises ``ArtifactError`` (QR512) if torch cannot export the model.
    """
    for part in parts.values():
        mark_sites(part.graph_module)
    graphs = {path: Interpreted(part.graph_module) for path, part in parts.items()}
    whole = with_parts(around, graphs).eval()
    with torch.no_grad():
        output = inputs.cloned().call(whole)
        float_output = None if as_float is None else inputs.cloned().call(runnable_copy(as_float))
    several = of_several(inputs)
    what = "the code around the roots cannot be exported"
    hint = "export a model whose own code has no branches on values, or without [fx] roots"
    failing = failing_as(ArtifactError, "QR512", what, hint)
    with failing, alone(), fx.traceback.preserve_node_meta():
        program: Any = exported(whole, several.args, several.kwargs).module()
    leaves = tuple(pytree.tree_leaves((inputs.args, dict(inputs.kwargs))))
    return Exportable(_plain(program), leaves, output, float_output)


def mark_sites(graph_module: fx.GraphModule) -> None:
    """Note sites where torch's exporters keep notes, in place."""
    for node in graph_module.graph.nodes:
        site = site_of(node)
        node.meta["stack_trace"] = "" if site is None else f"{TRACE_PREFIX}{site}"


class Interpreted(nn.Module):
    """Runs a graph node by node, so that operators get the ``meta`` of their node.

    Containers are returned as the graph's own code would: a list and not FX's own.
    """

    def __init__(self, source: fx.GraphModule) -> None:
        super().__init__()
        self.source = source

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = bind(self.source, self.source, Inputs(args, kwargs))
        return map_leaves(lambda leaf: leaf, fx.Interpreter(self.source).run(*given))


def _plain(program: fx.GraphModule) -> fx.GraphModule:
    """A program that takes the leaves of its inputs in order, and any batch."""
    graph = program.graph
    graph.set_codegen(CodeGen())
    for node in graph.find_nodes(op="call_module"):
        graph.erase_node(node)  # of an exported program, these are its assertions
    return fx.GraphModule(program, graph)
