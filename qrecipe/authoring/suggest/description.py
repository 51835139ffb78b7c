"""Why a suggested recipe is as it is and what it reaches, in sentences of one line each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from qrecipe.authoring.suggest.subject import Scheme, Subject
from qrecipe.errors.text import counted
from qrecipe.model.altered_modules import alteration
from qrecipe.planning.plan import Plan

ROBUST_SIZE = 10_000_000
"""Models with more parameters lose less to quantization, as a rule of thumb."""

_MOST_NAMED = 4
_LEAST_NAMED = 0.01
"""Shares below are not worth a name, nor advice."""

_SMALL_SHARE = 0.5
"""Below this share of the work in quantized operations a recipe does little."""


def description(subject: Subject, scheme: Scheme, plan: Plan) -> str:
    """Why this scheme, how much of the work is quantized, what stays float, and how large it is."""
    lines = [
        *_why(subject, scheme, plan),
        *_coverage(subject, plan),
        *_advice(subject, plan),
        *_size(subject),
    ]
    return "\n".join(lines) + "\n"


def _why(subject: Subject, scheme: Scheme, plan: Plan) -> Iterator[str]:
    yield _what_dominates(subject, scheme)
    if {site.mode for site in plan.sites} <= {"weight_only", None}:
        yield "Embeddings are quantized by their weights alone, so that no calibration is needed."
    elif scheme == "dynamic":
        yield "Ranges are found at run time, so that no calibration is needed."
    elif subject.has_few_batches:
        yield "Weights by the range of each channel, activations by that of all batches together."
        yield f"{_few(subject)}: a moving average would depend on which comes first."
    else:
        yield "Weights by the range of each channel, activations by a moving average of theirs."
        yield "Calibrate with about 100 representative mini-batches."
    if subject.untraced is not None:
        yield (
            "The model cannot be traced as a whole: what is outside the roots stays float."
            if subject.roots
            else "The model cannot be traced: modules are swapped one by one, functions stay float."
        )


def _few(subject: Subject) -> str:
    return f"There are {subject.num_batches} batches to calibrate with"


def _what_dominates(subject: Subject, scheme: Scheme) -> str:
    kind = {"static": "Static int8", "dynamic": "Dynamic int8", "mixed": "Mixed"}[scheme]
    if not subject.work.total:
        return f"{kind}: nothing in this model is multiplied with weights."
    convolutions = subject.work.convolution_share
    if scheme == "dynamic":
        return (
            f"{kind}: matrix products, such as those of linear and recurrent layers, are "
            f"{_percent(1 - convolutions)} of the multiplications with weights."
        )
    share = f"{_percent(convolutions)} of the multiplications with weights"
    if scheme == "static":
        return f"{kind}: convolutions are {share}."
    return (
        f"{kind}: convolutions ({share}) and what is around them static, linear and recurrent "
        "layers dynamic."
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
    quantized = sum(
        subject.work_of_sites.get(site.name, 0)
        for site in plan.sites
        if site.verdict == "quantized"
    )
    share = quantized / total
    text = f"{_percent(share)} of the multiplications with weights are in quantized operations"
    small = share < _SMALL_SHARE
    yield f"Most of the work stays float: {text}." if small else f"{text[0].upper()}{text[1:]}."
    left = Counter(_left_float(subject, plan)).most_common()
    named = [f"{what} {_percent(n / total)}" for what, n in left if n >= _LEAST_NAMED * total]
    if named:
        further = ["others"] if len(named) > _MOST_NAMED else []
        yield f"Left float: {', '.join([*named[:_MOST_NAMED], *further])}."


def _left_float(subject: Subject, plan: Plan) -> dict[str, int]:
    """The work that is not quantized: of sites by operation, outside of them by module."""
    left: Counter[str] = Counter()
    for site in plan.sites:
        if site.verdict != "quantized":
            left[site.op] += subject.work_of_sites.get(site.name, 0)
    where = "outside the roots" if subject.roots else "its functions"
    for path, count in subject.work_elsewhere.items():
        left[f"{path or 'the model itself'} ({where})"] += count
    return left


def _advice(subject: Subject, plan: Plan) -> Iterator[str]:
    """What to change about the model, where much of it stays float for a reason of its own."""
    least = max(1, _LEAST_NAMED * subject.work.total)
    modules = [
        module
        for site in plan.sites
        if site.verdict == "float" and subject.work_of_sites.get(site.name, 0) >= least
        if (module := subject.inventory.matches[site.name].module) is not None
    ]
    altered = [module for module in modules if alteration(module) is not None]
    if altered:
        yield "A layer with hooks or a parametrization has no kernel: make it a plain one first."
    if any(list(module.children()) for module in modules if module not in altered):
        yield (
            "Layers of torch that hold others, as for attention, are taken as a whole and have no "
            "kernel: write them with nn.Linear to have their projections quantized."
        )
    if subject.roots and any(count >= least for count in subject.work_elsewhere.values()):
        yield "A root is a module that holds others: put a single layer into an nn.Sequential."


def _size(subject: Subject) -> Iterator[str]:
    rule = f"As a rule of thumb models above {ROBUST_SIZE // 10**6} million parameters are more"
    yield f"{rule} robust to quantization; this one has {subject.work.parameters:,}."


def _percent(share: float) -> str:
    """Whole percents; neither nothing nor everything is said of what is only almost so."""
    if 0 < share < 0.005:
        return "less than 1%"
    return "more than 99%" if 0.995 <= share < 1 else f"{share:.0%}"
