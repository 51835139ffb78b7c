"""The numeric audit: a converted program compared with its reference, operator by operator."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qrecipe._torch_ao import quiet
from qrecipe.audit.modules import computes_otherwise
from qrecipe.audit.sample import JUDGEABLE_DB, RIGHT_DB, Sample
from qrecipe.audit.sqnr import output_sqnr_db, sqnr_db
from qrecipe.errors.findings import Finding
from qrecipe.errors.text import first_line
from qrecipe.model.addresses import site_of
from qrecipe.model.call import bind
from qrecipe.model.interpreter import Interpreter
from qrecipe.model.nested import tensors_in
from qrecipe.planning.plan import Plan
from qrecipe.process.memory import raise_lack_of_memory


def numeric_findings(
    plan: Plan, reference: fx.GraphModule, converted: fx.GraphModule, sample: Sample
) -> Iterator[Finding]:
    """The first site that computes something other than its reference (QR411), and low accuracy."""
    try:
        head, expected, found = _runs(reference, converted, sample)
    except Exception as error:
        raise_lack_of_memory(error)
        yield Finding("QR413", f"the converted model fails on the first batch: {first_line(error)}")
        return
    wrong = next(_wrong_sites(plan, converted, expected.results, found.results), None)
    if wrong is not None:
        yield wrong
        return
    agreement = output_sqnr_db(expected.output, found.output)
    if agreement is not None and not agreement >= RIGHT_DB:
        message = f"the output of the converted model is {agreement:.1f} dB from its reference"
        yield Finding("QR412", message, hint="report the model")
        return
    if _shapes(head.output) != _shapes(found.output):
        return  # how many results there are depends on values, which are rounded
    accuracy = output_sqnr_db(head.output, found.output)
    if accuracy is not None and not accuracy >= JUDGEABLE_DB and head is not sample:
        with torch.no_grad(), quiet():  # a few samples may be close to nothing
            accuracy = output_sqnr_db(sample.output, sample.inputs.call(converted))
    yield from _accuracy_findings(accuracy)


def _shapes(output: Any) -> list[torch.Size]:
    return [each.shape for each in tensors_in(output)]


def _wrong_sites(
    plan: Plan,
    converted: fx.GraphModule,
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
) -> Iterator[Finding]:
    """The sites that differ from their reference, in order; errors of one reach those after it."""
    sites = {site.name: site for site in plan.sites}
    for node in converted.graph.nodes:
        site = sites.get(site_of(node) or "")
        if site is None or node.name not in expected or node.name not in found:
            continue
        reached = sqnr_db(expected[node.name], found[node.name])
        if not reached >= RIGHT_DB:
            like = "its reference, and all before it agree"
            yield computes_otherwise(site, "the converted operator", f"{reached:.1f} dB", like)


def _accuracy_findings(accuracy: float | None) -> Iterator[Finding]:
    if accuracy is None:
        return
    if math.isnan(accuracy):
        yield Finding("QR412", "the converted model gives NaN")
    elif accuracy < JUDGEABLE_DB:
        yield Finding(
            "QR203",
            f"only {accuracy:.1f} dB against float on the first batch; no operator is wrong: the "
            "scheme is too coarse",
            hint="find the sites that cost most, leave them float or give them another observer",
        )


_aten: Any = torch.ops.aten

_UNINITIALISED = (
    *(_aten.empty.memory_format, _aten.empty_like.default, _aten.empty_permuted.default),
    *(_aten.empty_strided.default, _aten.new_empty.default, _aten.new_empty_strided.default),
)


class _Recorder(Interpreter):
    """Keeps the floating-point result of each operator; memory that nothing has filled is zero."""

    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__(program)
        self.results: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target in _UNINITIALISED:
            result.zero_()
        if isinstance(result, Tensor) and result.is_floating_point() and site_of(n) is not None:
            self.results[n.name] = result
        return result


@dataclass(frozen=True, slots=True)
class _Run:
    """The output of a program, and the results of its operators by name."""

    output: Any
    results: Mapping[str, Tensor]


def _runs(
    reference: fx.GraphModule, converted: fx.GraphModule, sample: Sample
) -> tuple[Sample, _Run, _Run]:
    """Both on the first samples, or on all of them if the program is fixed to their number."""
    return sample.on_head(lambda own: (own, _run(reference, own), _run(converted, own)))


def _run(program: fx.GraphModule, sample: Sample) -> _Run:
    recorder = _Recorder(program)
    with torch.no_grad(), quiet():
        output = recorder.run(*bind(program, program, sample.inputs.cloned()))
    return _Run(output, recorder.results)
