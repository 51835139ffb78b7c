"""What a compiler made of a program, audited: its integer kernels, and what they compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qrecipe.artifact.export.apart import apart
from qrecipe.artifact.export.program import Program
from qrecipe.audit.modules import computes_otherwise
from qrecipe.audit.sample import RIGHT_DB
from qrecipe.audit.sqnr import output_sqnr_db, sqnr_db
from qrecipe.errors.findings import Finding
from qrecipe.errors.text import counted
from qrecipe.model.nested import tensors_in

Compile = Callable[[fx.GraphModule, tuple[Any, ...]], Callable[..., Any]]
"""A graph, and arguments for it, to what computes the graph."""


@dataclass(frozen=True, slots=True)
class Lowering:
    """The layers with integer weights that became integer kernels of a compiler.

    ``seconds`` is the time that compiling took. ``without_kernel`` are the sites that the compiler
    has no integer kernel for: they compute the same with float kernels.
    """

    compiler: str
    layers: int
    without_kernel: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        made = f"{self.compiler} made {counted(self.layers, 'integer kernel')} of the layers"
        left = ", ".join(self.without_kernel)
        has_none = f"; it has none for {left}" if left else ""
        return f"{made} with weights in {self.seconds:.1f} s{has_none}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def layers_of(program: fx.GraphModule) -> Iterator[fx.Node]:
    """The convolutions and linear layers that read integer weights."""
    for node in program.graph.nodes:
        if str(node.target).startswith(_LAYERS) and any(map(_is_weight, node.all_input_nodes)):
            yield node


_LAYERS = ("aten.conv", "aten.linear")


def _is_weight(node: fx.Node) -> bool:
    is_dequantized = str(node.target).startswith("quantized_decomposed.dequantize_per_")
    return is_dequantized and node.all_input_nodes[0].op == "get_attr"


Judge = Callable[[Tensor, Tensor, float | None], str | None]
"""How far a result is from what a program has there, if that is too far.

The number is the distance between two values that the result can take, None if it is float.
"""


def in_db(expected: Tensor, found: Tensor, step: float | None) -> str | None:
    """A `Judge` that leaves room for roundings that fall the other way."""
    reached = sqnr_db(expected, found)
    return None if reached >= RIGHT_DB else f"{reached:.1f} dB"


def lowered_findings(program: Program, found: Any, compile: Compile) -> Iterator[Finding]:
    """Where a compiled program computes something else than the program (QR411, QR412).

    ``found`` is what it gives for the program's inputs. Roundings that fall the other way add up in
    deep models. So where the outputs differ, each site is judged apart from the others.
    """
    expected = list(tensors_in(program.output()))
    reached = output_sqnr_db(expected, list(tensors_in(found)))
    if reached is None or reached >= RIGHT_DB:
        return
    wrong = list(findings_apart(program, compile, in_db))
    yield from wrong
    if not wrong and math.isnan(reached):
        yield Finding("QR412", "the compiled program gives NaN", hint="report the model")


def findings_apart(program: Program, compile: Compile, judge: Judge) -> Iterator[Finding]:
    """The sites that compute something else (QR411) if they are compiled apart from the others.

    Each is given what it reads in the program.
    """
    sites = {site.name: site for site in program.plan.sites}
    alone = apart(program.graph_module, program.inputs)
    with torch.no_grad():
        found = compile(alone.graph_module, alone.args)(*alone.args)
    for name, *result in zip(alone.sites, alone.expected, found, alone.steps, strict=True):
        distance = judge(*result)
        if distance is not None:
            yield computes_otherwise(sites[name], "the compiled kernel", distance, "the program")
