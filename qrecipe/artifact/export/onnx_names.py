"""The nodes of an ONNX file named after the sites that they compute for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from qrecipe.model.addresses import TRACE_PREFIX

_TRACE = "pkg.torch.onnx.stack_trace"
"""Where torch's exporter keeps the stack trace of a node."""


def name_nodes(graph: Any) -> None:
    """Name nodes ``site/Operator``, and conversions between sites after what they convert.

    Of torch's notes, the site alone stays: the others have paths of this machine.
    """
    taken = Counter[str]()
    sites = [next(_site(node), None) for node in graph.node]
    givers = {given.name: given.name for given in graph.input}
    readers = {
        name: site for node, site in zip(graph.node, sites, strict=True) for name in node.input
    }
    for node, site in zip(graph.node, sites, strict=True):
        giver = site or next((givers[name] for name in node.input if name in givers), None)
        if giver is not None:
            givers.update(dict.fromkeys(node.output, giver))
        name = f"{giver or readers.get(node.output[0]) or 'constant'}/{node.op_type}"
        node.name = f"{name}#{taken[name]}" if taken[name] else name
        taken[name] += 1
        kept = [each for each in node.metadata_props if site and each.key == _TRACE]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)


def name_batch(graph: Any) -> None:
    """Call the first size of the inputs ``batch``, if it is free and the same for all of them."""
    firsts = {
        sizes[0].dim_param
        for given in graph.input
        if len(sizes := given.type.tensor_type.shape.dim)
    }
    if len(firsts) != 1 or not (symbol := firsts.pop()).isidentifier():
        return
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(rf"\b{symbol}\b", "batch", size.dim_param)


def _site(node: Any) -> Iterator[str]:
    for entry in node.metadata_props:
        if entry.key == _TRACE and entry.value.startswith(TRACE_PREFIX):
            yield entry.value.removeprefix(TRACE_PREFIX)
