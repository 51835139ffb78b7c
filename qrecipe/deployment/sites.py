"""Each site of a plan alone in a runtime, to find the kernel that computes something else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from qrecipe.artifact.export.apart import Apart, apart
from qrecipe.artifact.export.onnx import checked_content
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.deployment.job import Planned
from qrecipe.execution.part import Exportable
from qrecipe.model.call import Inputs
from qrecipe.pipeline import exportable, origin_of
from qrecipe.process.state import unheard
from qrecipe.process.warnings import held_back, unwarned
from qrecipe.runtimes.table import RUNTIMES, Name


def sites_alone(planned: Planned, runtime: Name) -> Mapping[str, float]:
    """What the kernel of each site reaches in dB, given what the site reads in the plan.

    For a runtime that takes ONNX.
    """
    found = exportable(planned.compiled, planned.prepared)
    with unheard(), held_back([("", Warning)]):
        program: Any = torch.export.export(found.graph_module, found.inputs).module()
    alone = apart(program, Inputs(found.inputs))
    given = tuple(_as_floats(alone))
    made = Exportable(alone.graph_module, given, alone.expected, None)
    with unwarned():
        content, _ = checked_content(made, origin_of(planned.compiled), None, ())
    outputs = RUNTIMES[runtime].open(content, 1).run(Inputs(given))
    pairs = zip(alone.sites, alone.expected, outputs, strict=True)
    return {name: sqnr_db(expected, each) for name, expected, each in pairs}


def _as_floats(alone: Apart) -> Iterator[Any]:
    """The arguments of the sites, in float; the graph quantizes them, in place.

    Runtimes look for a pair of conversions before a kernel in integers.
    """
    graph = alone.graph_module.graph
    placeholders = graph.find_nodes(op="placeholder")
    for node, value in zip(placeholders, alone.args, strict=True):
        readers = [user for user in node.users if _dequantizes(user)]
        if not readers:
            yield value
            continue
        first = readers[0]
        with graph.inserting_before(first):
            rounded = graph.call_function(_QUANTIZE, (node, *first.args[1:]))
        node.replace_all_uses_with(rounded, lambda user, own=rounded: user is not own)
        yield _DEQUANTIZE(value, *first.args[1:])
    alone.graph_module.recompile()


_QUANTIZE: Any = torch.ops.quantized_decomposed.quantize_per_tensor.default
_DEQUANTIZE: Any = torch.ops.quantized_decomposed.dequantize_per_tensor.default


def _dequantizes(node: fx.Node) -> bool:
    return str(node.target) == str(_DEQUANTIZE)
