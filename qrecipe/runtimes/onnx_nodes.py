"""The nodes of an ONNX file, and the sites that they compute for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from qrecipe.model.addresses import TRACE_PREFIX
from qrecipe.runtimes.session import Kernel

_TRACE = "pkg.torch.onnx.stack_trace"


def sites_of_nodes(source: Path | bytes) -> Mapping[str, str]:
    """The site of each node that has one, in a file that qrecipe exported."""
    onnx: Any = import_module("onnx")
    load = onnx.load_from_string if isinstance(source, bytes) else onnx.load
    return dict(_sites(load(source).graph))


def _sites(graph: Any) -> Iterator[tuple[str, str]]:
    for node in graph.node:
        for entry in node.metadata_props:
            if entry.key == _TRACE and entry.value.startswith(TRACE_PREFIX):
                yield node.name, entry.value.removeprefix(TRACE_PREFIX)


def in_integers(kernels: Sequence[Kernel], sites: Mapping[str, str]) -> frozenset[str]:
    """The sites that kernels compute in integers, given the site of each node."""
    return frozenset(
        sites[name]
        for kernel in kernels
        if kernel.is_integer
        for name in kernel.nodes
        if name in sites
    )
