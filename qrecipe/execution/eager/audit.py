"""The audit of a model converted in eager mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from qrecipe._torch_fx import DynamicLinear
from qrecipe.audit.float_kernels import expected_output, with_weight_of
from qrecipe.audit.modules import EQUAL_INPUT, computes_otherwise, differs, weight_problem
from qrecipe.audit.sample import JUDGEABLE_DB, RIGHT_DB, Sample
from qrecipe.audit.sqnr import output_sqnr_db, sqnr_db
from qrecipe.errors.findings import Finding
from qrecipe.errors.text import first_line
from qrecipe.errors.warn import settle
from qrecipe.execution.eager.scaled import ScaledDynamicLinear
from qrecipe.model.call import Inputs
from qrecipe.model.copies import runnable_copy
from qrecipe.model.dry_run import around_calls
from qrecipe.model.nested import tensors_in
from qrecipe.model.quantized import module_became
from qrecipe.model.scaled_input import ScaledLinear, without_scale
from qrecipe.model.untraceable import WITHOUT_AUTOCAST
from qrecipe.planning.plan import Plan, Site
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.recipe.schema import LintTable


def audit(
    plan: Plan, prepared: nn.Module, converted: nn.Module, sample: Sample, lint: LintTable
) -> None:
    """Compare classes and numbers with the plan.

    Each Linear and Embedding is checked alone, on its input in the float model and against float
    arithmetic with its rounded weight; recurrent modules round again at every step and are only
    checked by the model's output.

    Raises ``AuditError`` for another class or weight (QR410), a wrong kernel (QR411), or a model
    that gives NaN (QR412) or does not run (QR413).
    """
    structure = list(_structure_findings(plan, converted))
    settle(structure or _numeric_findings(plan, prepared, converted, sample), lint.ignore)


def _structure_findings(plan: Plan, converted: nn.Module) -> Iterator[Finding]:
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
        elif problem := weight_problem(site, module, {}):
            yield differs(site, expected, problem)
    for name in planned.keys() - {path for path, _ in converted.named_modules()}:
        yield differs(planned[name], planned[name].mode or "float", "vanished")


def _numeric_findings(
    plan: Plan, prepared: nn.Module, converted: nn.Module, sample: Sample
) -> Iterator[Finding]:
    sites = [site for site in plan.sites if site.mode is not None]
    names = [site.name for site in sites]
    if not sites:
        return
    try:
        calls, output = _calls_of(converted, names, sample.inputs)
    except Exception as error:
        raise_lack_of_memory(error)
        where = _where_it_fails(converted, sample.inputs)
        yield _failed(error, where, *_calls_of(prepared, names, sample.inputs))
        return
    before, _ = _calls_of(prepared, names, sample.inputs)
    yield from (_unreached(site) for site in sites if site.name in before.keys() - calls.keys())
    wrong = [
        finding
        for site in sites
        if site.name in calls
        and (finding := _judged(site, calls[site.name], prepared, converted, plan))
    ]
    yield from wrong
    reached = output_sqnr_db(sample.output, output)
    if wrong or reached is None:
        return
    if math.isnan(reached):
        yield Finding("QR412", "the converted model gives NaN, or an output of another structure")
    elif reached < JUDGEABLE_DB:
        yield Finding(
            "QR203",
            f"only {reached:.1f} dB against float on the first batch",
            hint="find the sites that cost most (qrecipe sensitivity) and leave them float",
        )


def _failed(error: Exception, where: str, calls: Mapping[str, Inputs], _: Any) -> Finding:
    """Why the converted model fails, from the inputs of its modules in float."""
    what = f"the converted model fails on the first batch{where}: {first_line(error)}"
    for name, inputs in calls.items():
        dtypes = {
            x.dtype for x in tensors_in((inputs.args, inputs.kwargs)) if x.is_floating_point()
        }
        for dtype in dtypes - {torch.float32}:
            given = str(dtype).removeprefix("torch.")
            what = f"{name} gets {given}, but its kernel takes float32: {first_line(error)}"
            return Finding("QR413", what, hint=WITHOUT_AUTOCAST)
    return Finding(
        "QR413",
        what,
        hint="a quantized module has no weight tensor, and takes its input by position: if "
        "forward needs anything else, leave the module float",
    )


def _where_it_fails(model: nn.Module, inputs: Inputs) -> str:
    """The innermost submodule that raises, to follow a verb; empty for the model's own forward."""
    failed: list[str] = []
    probe = runnable_copy(model)

    def note_failure(path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except Exception:
            failed.append(path)
            raise

    around_calls(probe, [path for path, _ in probe.named_modules() if path], note_failure)
    with torch.no_grad(), suppress(Exception):
        inputs.call(probe)
    return f" in {failed[0]}" if failed else ""


def _calls_of(model: nn.Module, names: list[str], inputs: Inputs) -> tuple[dict[str, Inputs], Any]:
    """The first inputs of some modules and the model's output, from a run of a copy."""
    probe = runnable_copy(model)
    taken: dict[str, Inputs] = {}

    def take(path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if path not in taken:  # cloned because later code may write to them
            taken[path] = Inputs(args, kwargs).cloned()
        return forward(*args, **kwargs)

    around_calls(probe, names, take)
    with torch.no_grad():
        return taken, inputs.call(probe)


def _unreached(site: Site) -> Finding:
    return Finding(
        "QR410",
        f"{site.name} was converted, but the model still calls the original module",
        site.rule.location,
        hint="does the model also keep it in a plain list, dict or tuple? use nn.ModuleList or "
        "nn.ModuleDict",
    )


def _judged(
    site: Site, inputs: Inputs, prepared: nn.Module, converted: nn.Module, plan: Plan
) -> Finding | None:
    kernel, own = converted.get_submodule(site.name), prepared.get_submodule(site.name)
    forward: Any = kernel.forward
    if isinstance(kernel, ScaledDynamicLinear) and isinstance(own, ScaledLinear):
        inputs = replace(inputs, args=(inputs.args[0] * own.input_factor,))
        forward, own = partial(DynamicLinear.forward, kernel), without_scale(own)
    compute = partial(with_weight_of, kernel, own)
    with torch.no_grad():
        expected = expected_output(kernel, compute, inputs, plan.backend)
        if expected is None:
            return None
        # without the caller's hooks, which are not part of the kernel
        reached = sqnr_db(expected, forward(*inputs.args, **dict(inputs.kwargs)))
    if reached >= RIGHT_DB:
        return None
    return computes_otherwise(site, "the quantized kernel", f"{reached:.1f} dB", EQUAL_INPUT)
