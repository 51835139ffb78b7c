"""What a compiler made of a program, audited: its integer kernels, and what they compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qrecipe.artifact.export.apart import apart
from qrecipe.artifact.export.deviations import Deviation, Judge, Result, agreement, in_db
from qrecipe.artifact.export.program import Program
from qrecipe.audit.modules import computes_otherwise
from qrecipe.audit.sample import RIGHT_DB
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import Finding
from qrecipe.errors.short import ShortRepr
from qrecipe.errors.text import counted
from qrecipe.model.call import Inputs
from qrecipe.model.nested import tensors_in

Compute = Callable[[fx.GraphModule, Inputs], Sequence[Tensor]]
"""A graph that returns a tuple, and inputs, to what it gives for them."""


@dataclass(frozen=True, slots=True, repr=False)
class Lowering(ShortRepr):
    """The layers with integer weights that became integer kernels of a compiler.

    ``seconds`` is the time that compiling took. ``without_kernel`` are the sites that the compiler
    has no integer kernel for: they compute the same with float kernels. ``deviations`` are the
    sites whose results differ from the program's if each is run alone, none if the whole gives the
    same bits; None if only a difference that matters was looked for. ``exact`` is whether the whole
    gives the bits of the program, or those of the program computed in integers.
    """

    compiler: str
    layers: int
    without_kernel: tuple[str, ...]
    seconds: float
    deviations: tuple[Deviation, ...] | None = None
    exact: bool = False

    def __str__(self) -> str:
        made = f"{self.compiler} made {counted(self.layers, 'integer kernel')} of the layers"
        left = ", ".join(self.without_kernel)
        has_none = f"; it has none for {left}" if left else ""
        text = f"{made} with weights in {self.seconds:.1f} s{has_none}"
        if self.deviations is None:
            return text
        return f"{text}\n{agreement(self.deviations, exact=self.exact)}"

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


def lowered_findings(program: Program, found: Any, compute: Compute) -> Iterator[Finding]:
    """Where a compiled program computes something other than the program (QR411, QR412).

    ``found`` is what it gives for the program's inputs. Roundings that fall the other way add up in
    deep models. So where the outputs differ, each site is judged apart from the others.
    """
    expected = list(tensors_in(program.output()))
    reached = output_sqnr_db(expected, list(tensors_in(found)))
    if reached is None or reached >= RIGHT_DB:
        return
    wrong = list(judged_apart(results_apart(program, compute), in_db))
    yield from wrong
    if not wrong and math.isnan(reached):
        yield Finding("QR412", "the compiled program gives NaN", hint="report the model")


def results_apart(program: Program, compute: Compute) -> Iterator[Result]:
    """What the sites give if they are computed apart from the others.

    Each is given what it reads in the program.
    """
    sites = {site.name: site for site in program.plan.sites}
    alone = apart(program.graph_module, program.inputs)
    with torch.no_grad():
        found = compute(alone.graph_module, Inputs(alone.args))
    own = map(sites.__getitem__, alone.sites)
    values = (own, alone.expected, found, alone.unrounded, alone.steps)
    yield from (Result(*each) for each in zip(*values, strict=True))


def judged_apart(results: Iterable[Result], judge: Judge) -> Iterator[Finding]:
    """The sites that compute something else (QR411)."""
    for result in results:
        distance = judge(result)
        if distance is not None:
            yield computes_otherwise(result.site, "the compiled kernel", distance, "the program")
