"""Warnings about a plan: speed and training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qrecipe.errors.findings import Finding
from qrecipe.errors.text import counted
from qrecipe.model.graph_sites import Inventory, Match
from qrecipe.planning.asked import PACK
from qrecipe.planning.engines import ENGINES_OF_X86, is_slow
from qrecipe.planning.plan import EXPORTED, Site
from qrecipe.planning.small_layers import hardly_multiplies, small_layers
from qrecipe.recipe.patterns import leave_float
from qrecipe.recipe.schema import Backend, Executor
from qrecipe.rules.resolution import listed
from qrecipe.rules.structure import Member, Operation

_TINY_MODEL = 10_000
"""With fewer weights, quantizing and dequantizing may cost more than the kernels save."""


def advice(
    sites: Sequence[Site],
    inventory: Inventory,
    backend: Backend,
    executor: Executor,
    boundaries: int,
) -> Iterator[Finding]:
    """Warnings about the speed of the quantized model (QR207, QR208)."""
    runs_here = executor in PACK and backend not in EXPORTED
    if runs_here:
        yield from _slow_kernels(sites, inventory, backend, boundaries)
    if any(_weight_count(inventory.matches[site.name]) for site in sites if site.mode == "static"):
        quantized = [inventory.matches[site.name] for site in sites if site.mode is not None]
        weights = sum(map(_weight_count, quantized))
        if weights < _TINY_MODEL:
            both = "qrecipe quantize prints the latency of both"
            yield Finding(
                "QR208",
                f"the quantized sites only have {weights} weights: "
                "such a small model can be slower in int8",
                hint=f"measure: {both}" if runs_here else "measure it where it will run",
            )


def _slow_kernels(
    sites: Sequence[Site], inventory: Inventory, backend: Backend, boundaries: int
) -> Iterator[Finding]:
    """What is known about torch's own kernels (QR207); compilers and other runtimes differ."""
    matches = inventory.matches
    slow = [
        site
        for site in sites
        if site.mode == "static"
        and site.qconfig is not None
        and is_slow(matches[site.name], backend, site.qconfig.weight, site.engine)
    ]
    if slow:
        yield _slower(slow, "convolutions in small groups or transposed")
    if backend in ENGINES_OF_X86 and hardly_multiplies(sites, inventory, boundaries):
        yield Finding(
            "QR207",
            f"int8 is probably slower than float at batch 1: {boundaries} conversions between int8 "
            "and float, and fewer than a million multiplications for each",
            hint="let qrecipe fastest measure and choose",
        )
    small = small_layers(sites, inventory) if backend in ENGINES_OF_X86 else []
    if small:
        yield _slower(small, "layers that are small for the example's size")


def _slower(sites: Sequence[Site], what: str) -> Finding:
    """A warning (QR207) that names the sites which are slower in int8 than in float."""
    return Finding(
        "QR207",
        f"int8 is slower than float at {counted(len(sites), 'site')}, {what}: "
        f"{listed([site.name for site in sites])}",
        sites[0].rule.location,
        hint="leave them float, or let qrecipe fastest measure and choose",
    )


def _weight_count(match: Match) -> int:
    """The number of weights in matrices and kernels, including recurrent layers, without biases."""
    parameters = () if match.module is None else match.module.parameters()
    return sum(parameter.numel() for parameter in parameters if parameter.dim() > 1)


def shared_norm_findings(sites: Sequence[Site], inventory: Inventory) -> Iterator[Finding]:
    """Quantized modules that are called several times and fused with a BatchNorm (QR312).

    Every call would update the statistics of the BatchNorm, which scale the weight of all calls.
    """
    calls: dict[str, list[Operation]] = {}
    for operation in inventory.structure.operations:
        first, *others = operation.members
        for member in (first, *filter(_is_norm, others)):  # those after them only compute
            if member.module is not None:
                calls.setdefault(member.module, []).append(operation)
    site_of = {site.name: site for site in sites if site.qconfig is not None}
    for module, operations in calls.items():
        quantized = [
            op.name
            for op in operations
            if len(op.members) > 1 and any(map(_is_norm, op.members)) and op.name in site_of
        ]
        if len(operations) > 1 and quantized:
            yield Finding(
                "QR312",
                f"{module} is called {len(operations)} times and fused with a BatchNorm at "
                f"{quantized[0]}: training cannot share it",
                site_of[quantized[0]].rule.location,
                hint=f"{leave_float(quantized[0])}, or give each call its own module",
            )


def _is_norm(member: Member) -> bool:
    return member.op.startswith("BatchNorm")


def branch_findings(inventory: Inventory) -> Iterator[Finding]:
    """What a forward does in training mode or without gradients, but its graph does not (QR205)."""
    for path in dict.fromkeys(inventory.trained_otherwise):
        where = f"the forward of {path}" if path else "the model's own forward"
        yield Finding(
            "QR205",
            f"{where} behaves differently in training mode; only its eval branch is trained",
            hint="the prepared model lacks everything that only training mode has (noise, outputs "
            "for a loss)",
        )
    if inventory.ungraded:
        where = listed([path or "the model's own forward" for path in inventory.ungraded])
        yield Finding(
            "QR205",
            f"parameters get gradients that they do not get in your forward: {where}",
            hint="a graph has no torch.no_grad(): call requires_grad_(False) on parameters that "
            "must not be trained, or detach() on the result in forward",
        )
