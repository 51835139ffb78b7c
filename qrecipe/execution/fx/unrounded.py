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
from qrecipe.errors.findings import AuditError, Finding
from qrecipe.errors.text import first_line
from qrecipe.model.call import bind
from qrecipe.model.nested import tensors_in
from qrecipe.model.rewrite_proof import passing
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

    ``sample`` has inputs and outputs of the prepared model. Its first samples can prove equality,
    but not disprove it: a model that mixes samples needs all of them.

    Raises ``AuditError`` (QR412) if they differ.
    """
    if phase == "qat":  # its fake-quants round
        prepared = passing(prepared)
        with torch.no_grad():
            sample = Sample(sample.inputs, sample.inputs.cloned().call(prepared))
    head = sample.head()
    if head is not None and _difference(reference, prepared, head) is None:
        return
    found = _difference(reference, prepared, sample)
    if found is not None:
        raise AuditError(
            Finding(
                "QR412",
                f"torch's conversion changed more than the rounding: {found}",
                hint="leave parts of the model float until it is right, and report the model",
            )
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


class _Unrounded(fx.Interpreter):
    """Runs a reference graph with the original float modules and without rounding."""

    def __init__(self, reference: fx.GraphModule, prepared: fx.GraphModule) -> None:
        super().__init__(reference)
        self._float_modules = dict(prepared.named_modules(remove_duplicate=False))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = str(getattr(target, "__name__", target))
        if name.startswith(_ROUNDING):
            return args[0]
        return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target == "dequantize" or (target == "to" and torch.float16 in args):
            return args[0]
        return super().call_method(target, args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: nn.Module = self._float_modules.get(target) or self.fetch_attr(target)
        return module(*args, **kwargs)
