"""The proof that a model converted in eager mode is what the plan says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qrecipe.converted import differs, module_became, weight_problem
from qrecipe.copying import structural_copy
from qrecipe.errors import CODES, Finding, error_from, first_line
from qrecipe.fx.numerics import JUDGEABLE_DB, RIGHT_KERNEL_DB, Sample
from qrecipe.inputs import Inputs
from qrecipe.linting import warn
from qrecipe.planning import Plan, Site
from qrecipe.schema import LintTable
from qrecipe.sqnr import output_sqnr_db, sqnr_db


def audit(
    plan: Plan, prepared: nn.Module, converted: nn.Module, sample: Sample, lint: LintTable
) -> None:
    """Compare classes and numbers with the plan.

    Each Linear and Embedding is judged alone, on the input that it gets in the float model and
    against float arithmetic with its own rounded weight; recurrent modules round anew at every
    step and are judged by the output of the model only.

    Raises ``AuditError``: another class or weight (QR410), a wrong kernel (QR411), a model that
    gives NaN (QR412) or does not run (QR413).
    """
    findings = list(_structure_findings(plan, prepared, converted))
    if not findings:
        findings = list(_numeric_findings(plan, prepared, converted, sample))
    errors = [finding for finding in findings if CODES[finding.code].error is not None]
    if errors:
        raise error_from(errors)
    for finding in findings:
        warn(finding, lint)


def _structure_findings(plan: Plan, prepared: nn.Module, converted: nn.Module) -> Iterator[Finding]:
    planned = {site.name: site for site in plan.sites}
    for path, module in converted.named_modules():
        site, became = planned.get(path), module_became(module)
        expected = "float" if site is None else site.mode or "float"
        if site is None:
            is_inside = any(path.startswith(f"{name}.") for name in planned)
            if became != "float" and not is_inside:
                yield Finding("QR410", f"{path} was converted and is not in the plan")
        elif became != expected:
            yield differs(site, expected, f"became {became} ({type(module).__qualname__})")
        elif problem := weight_problem(site, module):
            yield differs(site, expected, problem)
    for name in planned.keys() - {path for path, _ in converted.named_modules()}:
        yield differs(planned[name], planned[name].mode or "float", "vanished")


def _numeric_findings(
    plan: Plan, prepared: nn.Module, converted: nn.Module, sample: Sample
) -> Iterator[Finding]:
    sites = [site for site in plan.sites if site.mode is not None]
    if not sites:
        return
    try:
        with torch.no_grad():
            reached = output_sqnr_db(sample.output, sample.inputs.call(converted))
    except Exception as error:
        yield Finding(
            "QR413",
            f"the converted model fails on the first batch: {first_line(error)}",
            hint="does its forward reach for the weight of a module? leave that module float",
        )
        return
    inputs = _inputs_of(prepared, [site.name for site in sites], sample.inputs)
    bits = 8 if plan.backend == "qnnpack" else 7
    wrong = [
        finding
        for site in sites
        if (finding := _judged(site, inputs[site.name], prepared, converted, bits))
    ]
    yield from wrong
    if wrong or reached is None:
        return
    if math.isnan(reached):
        yield Finding("QR412", "the converted model gives NaN, or an output of another structure")
    elif reached < JUDGEABLE_DB:
        yield Finding(
            "QR203",
            f"only {reached:.1f} dB against float on the first batch",
            hint="find the sites that hurt and leave them float",
        )


def _inputs_of(model: nn.Module, names: list[str], inputs: Inputs) -> dict[str, Inputs]:
    """What each of some modules is called with first."""
    taken: dict[str, Inputs] = {}
    probe = structural_copy(model)
    for name in names:
        probe.get_submodule(name).register_forward_pre_hook(
            partial(_take, taken, name), with_kwargs=True
        )
    with torch.no_grad():
        inputs.call(probe)
    return taken


def _take(
    taken: dict[str, Inputs], name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> None:
    taken.setdefault(name, Inputs(args, kwargs))


def _judged(
    site: Site, inputs: Inputs, prepared: nn.Module, converted: nn.Module, bits: int
) -> Finding | None:
    module, kernel = prepared.get_submodule(site.name), converted.get_submodule(site.name)
    with torch.no_grad():
        expected = _reference(module, kernel, inputs, bits)
        if expected is None:
            return None
        reached = sqnr_db(expected, inputs.call(kernel))
    if reached >= RIGHT_KERNEL_DB:
        return None
    return Finding(
        "QR411",
        f"the quantized kernel of {site.name} ({site.op}) computes something else: "
        f"{reached:.1f} dB from its reference on equal input",
        site.rule.location,
        hint=f'leave it float: [rules.module_name] "{site.name}" = "float"',
    )


def _reference(module: nn.Module, kernel: Any, inputs: Inputs, bits: int) -> Tensor | None:
    """What float arithmetic makes of the rounded weight, and of an input rounded to ``bits``."""
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        return None
    (x,) = inputs.args or inputs.kwargs.values()
    if isinstance(module, nn.Embedding):
        return F.embedding(x, kernel.weight().dequantize())
    if not x.numel():
        return None
    weight: Tensor = kernel.weight()
    if weight.is_quantized:
        return F.linear(_rounded(x, bits), weight.dequantize(), module.bias)
    return F.linear(x, weight, module.bias)


def _rounded(x: Tensor, bits: int) -> Tensor:
    """As the dynamic kernels round it: affine, over the range of this very tensor."""
    most = 2**bits - 1
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = max((high - low) / most, 1e-12)
    zero_point = min(round(-low / scale), most)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, most)
