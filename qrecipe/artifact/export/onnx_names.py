"""The names in an ONNX file: of nodes after the sites that they compute for, of outputs by key."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import count
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


def name_outputs(graph: Any, names: Sequence[str | None]) -> None:
    """Give outputs these names, if they are known, and inputs those that outputs took from them.

    An input keeps its name: an output of the same name is ``NAME_out``. Values inside give way.
    """
    outputs = [each.name for each in graph.output]
    if len(names) != len(outputs):
        return
    inputs = {
        each.name: own if (own := each.name.removesuffix("_orig")) in outputs else each.name
        for each in graph.input
    }
    new = dict(inputs)
    for old, name in zip(outputs, names, strict=True):
        wanted = old if name is None else name
        new[old] = _free(wanted, new.values(), f"{wanted}_out")
    inside = set(_values(graph)).difference(new)
    taken = {*new.values(), *inside}
    for name in inside.intersection(new.values()):
        new[name] = next(each for at in count() if (each := f"{name}_{at}") not in taken)
        taken.add(new[name])
    _rename(graph, new)


def _free(name: str, taken: Collection[str], other: str) -> str:
    while name in taken:
        name, other = other, f"{other}_out"
    return name


def _values(graph: Any) -> Iterator[str]:
    """The names of all values, also those of graphs inside operators."""
    for part in _graphs(graph):
        for each in (*part.input, *part.output, *part.initializer):
            yield each.name
        for node in part.node:
            yield from (*node.input, *node.output)


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _graphs(inner)


def _rename(graph: Any, new: Mapping[str, str]) -> None:
    for part in _graphs(graph):
        for each in (*part.input, *part.output, *part.initializer, *part.value_info):
            each.name = new.get(each.name, each.name)
        for node in part.node:
            for names in (node.input, node.output):
                names[:] = [new.get(name, name) for name in names]


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
