"""A reference conversion without rounding has to equal the prepared model.

Anything else that torch's conversion changes in a graph affects both the kernels and the reference
that judges them. Only a run without rounding shows it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from qrecipe._torch_ao import quiet
from qrecipe.audit.sample import Sample
from qrecipe.errors.findings import AuditError
from qrecipe.errors.text import first_line
from qrecipe.model.call import bind
from qrecipe.model.interpreter import Interpreter
from qrecipe.model.nested import tensors_in
from qrecipe.model.rewrite_proof import passing
from qrecipe.model.same_graph import observes, same_calls
from qrecipe.model.trace_proof import difference
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.recipe.schema import Phase

_ROUNDING = ("quantize_per_", "dequantize")

_FLIPPED = 0.001
"""The share of results that a threshold may flip if sums differ in their last bits."""


def check_conversion(
    reference: fx.GraphModule, prepared: fx.GraphModule, sample: Sample, phase: Phase
) -> None:
    """Check that a reference conversion equals its prepared model, except for rounding.

    Where the graphs are not the same, they are run on ``sample``, which has inputs and outputs of
    the prepared model. Its first samples can prove equality, but not disprove it: a model that
    mixes samples needs all of them.

    Raises ``AuditError`` (QR412) if they differ.
    """
    if same_calls(reference.graph, prepared.graph, _rounds, observes):
        return
    if phase == "qat":  # its fake-quants round
        prepared = passing(prepared)
        with torch.no_grad():
            sample = Sample(sample.inputs, sample.inputs.cloned().call(prepared))
    head = sample.head()
    if head is not None and _difference(reference, prepared, head) is None:
        return
    found = _difference(reference, prepared, sample)
    if found is not None:
        raise AuditError.of(
            "QR412",
            f"torch's conversion changed more than the rounding: {found}",
            hint="leave parts of the model float until it is right, and report the model",
        )


def _difference(reference: fx.GraphModule, prepared: fx.GraphModule, sample: Sample) -> str | None:
    expected = list(tensors_in(sample.output))
    if any(x.is_floating_point() and x.dtype != torch.float32 for x in expected):
        return None  # it ran under autocast, which `around_roots.dtype_findings` reports
    run = _Unrounded(reference, prepared)
    try:
        with torch.no_grad(), quiet():
            actual = run.run(*bind(reference, reference, sample.inputs.cloned()))
    except Exception as error:
        raise_lack_of_memory(error)
        if _fails(reference, sample):
            return None  # it fails with rounding too: the audit reports it
        return f"without rounding it fails: {first_line(error)}"
    return difference(expected, list(tensors_in(actual)), _FLIPPED)


def _fails(reference: fx.GraphModule, sample: Sample) -> bool:
    try:
        with torch.no_grad(), quiet():
            sample.inputs.cloned().call(reference)
    except Exception as error:
        raise_lack_of_memory(error)
        return True
    return False


def _rounds(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target == "dequantize" or (node.target == "to" and torch.float16 in node.args)
    name = str(getattr(node.target, "__name__", node.target))
    return node.op == "call_function" and name.startswith(_ROUNDING)


class _Unrounded(Interpreter):
    """Runs a reference graph with the original float modules and without rounding."""

    def __init__(self, reference: fx.GraphModule, prepared: fx.GraphModule) -> None:
        super().__init__(reference)
        self._float_modules = dict(prepared.named_modules(remove_duplicate=False))

    def run_node(self, n: fx.Node) -> Any:
        return self.env[n.all_input_nodes[0]] if _rounds(n) else super().run_node(n)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: nn.Module = self._float_modules.get(target) or self.fetch_attr(target)
        return module(*args, **kwargs)
