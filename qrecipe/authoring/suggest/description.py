"""The description of a suggested recipe: the reasons for it and what it covers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from qrecipe.authoring.suggest.schemes import MOST, Scheme, Subject
from qrecipe.errors.text import counted
from qrecipe.model.altered_modules import alteration
from qrecipe.planning.plan import Plan

ROBUST_SIZE = 10_000_000
"""Models with more parameters lose less to quantization, as a rule of thumb."""

_MOST_NAMED = 4
_LEAST_NAMED = 0.01
"""Smaller shares are neither listed nor worth advice."""


_KINDS: Mapping[Scheme, str] = {
    "static": "Static int8",
    "dynamic": "Dynamic int8",
    "mixed": "Mixed",
    "float16": "Dynamic float16",
}


def description(subject: Subject, scheme: Scheme, plan: Plan) -> str:
    """Why this scheme, how much of the work it quantizes, what stays float, and the size."""
    lines = [
        *_why(subject, scheme, plan),
        *(remedy.reason for remedy in subject.remedies),
        *_coverage(subject, plan),
        *_advice(subject, plan),
        *_size(subject),
    ]
    return "\n".join(lines) + "\n"


def _why(subject: Subject, scheme: Scheme, plan: Plan) -> Iterator[str]:
    yield _what_dominates(subject, scheme)
    if {site.mode for site in plan.sites} <= {"weight_only", None}:
        yield "Only the weights of embeddings are quantized, so no calibration is needed."
    elif scheme == "float16":
        yield "The weights take half the memory, and the arithmetic stays float."
    elif scheme == "dynamic":
        yield "Activation ranges are found at run time, so no calibration is needed."
    elif subject.has_few_batches:
        yield "Weights use a range per channel, activations the range of all batches."
        batches = counted(subject.num_batches or 0, "batch")
        yield f"With {batches} to calibrate on, a moving average would depend on their order."
    else:
        yield "Weights use a range per channel, activations a moving average of their range."
        yield "Calibrate with about 100 representative mini-batches."
    tried = subject.reasons
    if subject.executor == "pt2e":
        yield f"PT2E executes the program of torch.export, because {tried[0]}."
        yield "Its kernels are float kernels, with the results of int8: compile it to be faster."
        tried = tried[1:]
    elif subject.roots or subject.inventory.untraced is not None:
        how = (
            "Only the roots are quantized, and what is outside the roots stays float"
            if subject.roots
            else "Modules are swapped one by one, functions stay float"
        )
        yield f"{how}, because {tried[0]}."
        tried = tried[1:]
    yield from (f"Tried without success: {each}." for each in tried)


def _what_dominates(subject: Subject, scheme: Scheme) -> str:
    kind = _KINDS[scheme]
    if not subject.work.total:
        return f"{kind}: nothing in this model multiplies with weights."
    convolutions = subject.work.convolution_share
    if scheme in ("dynamic", "float16"):
        return (
            f"{kind}: matrix products, such as those of linear and recurrent layers, are "
            f"{_percent(1 - convolutions)} of the multiplications with weights."
        )
    share = f"{_percent(convolutions)} of the multiplications with weights"
    if scheme == "static":
        return f"{kind}: convolutions are {share}."
    return (
        f"{kind}: convolutions ({share}) and the operations around them are static, linear and "
        "recurrent layers dynamic."
    )


def _coverage(subject: Subject, plan: Plan) -> Iterator[str]:
    counts = Counter(site.verdict for site in plan.sites)
    where = " inside the roots" if subject.roots else ""
    yield (
        f"{counted(len(plan.sites), 'operation')}{where}: {counts['quantized']} quantized, "
        f"{counts['passthrough']} passthrough, {counts['float']} float."
    )
    total = subject.work.total
    if not total:
        return
    share = subject.covered(plan)
    text = f"{_percent(share)} of the multiplications with weights are in quantized operations"
    small = share < MOST
    yield f"Most of the work stays float: {text}." if small else f"{text[0].upper()}{text[1:]}."
    left = Counter(_left_float(subject, plan)).most_common()
    named = [f"{what} {_percent(n / total)}" for what, n in left if n >= _LEAST_NAMED * total]
    if named:
        further = ["others"] if len(named) > _MOST_NAMED else []
        yield f"Left float: {', '.join([*named[:_MOST_NAMED], *further])}."


def _left_float(subject: Subject, plan: Plan) -> dict[str, int]:
    """The work that is not quantized: in sites by operation, elsewhere by module."""
    left: Counter[str] = Counter()
    for site in plan.sites:
        if site.verdict != "quantized":
            left[site.op] += subject.work_of_sites.get(site.name, 0)
    where = "outside the roots" if subject.roots else "its functions"
    for path, count in subject.work_elsewhere.items():
        left[f"{path or 'the model itself'} ({where})"] += count
    return left


def _advice(subject: Subject, plan: Plan) -> Iterator[str]:
    """What to change in the model if much of it stays float because of how it is written."""
    least = max(1, _LEAST_NAMED * subject.work.total)
    modules = [
        module
        for site in plan.sites
        if site.verdict == "float" and subject.work_of_sites.get(site.name, 0) >= least
        if (module := subject.inventory.matches[site.name].module) is not None
    ]
    altered = [module for module in modules if alteration(module) is not None]
    if altered:
        yield "A layer with hooks or a parametrization has no kernel: remove them first."
    if any(list(module.children()) for module in modules if module not in altered):
        yield (
            "Composite layers of torch, such as attention, have no kernel: write them with "
            "nn.Linear to quantize their projections."
        )
    if subject.roots and any(count >= least for count in subject.work_elsewhere.values()):
        yield "A root must contain other modules: wrap a single layer in nn.Sequential."


def _size(subject: Subject) -> Iterator[str]:
    rule = f"As a rule of thumb, models with over {ROBUST_SIZE // 10**6} million parameters are"
    yield f"{rule} more robust to quantization; this one has {subject.work.parameters:,}."


def _percent(share: float) -> str:
    """Whole percents, but never 0% or 100% for what is only almost so."""
    if 0 < share < 0.005:
        return "less than 1%"
    return "more than 99%" if 0.995 <= share < 1 else f"{share:.0%}"
