"""The numeric audit: the converted model compared with torch's reference model on one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from qrecipe._torch_ao import quiet
from qrecipe.audit.modules import computes_otherwise
from qrecipe.audit.sample import CAUSE_DB, JUDGEABLE_DB, RIGHT_DB, TOLERANCE_DB, Sample
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import AuditError, Finding, QRecipeError
from qrecipe.errors.text import first_line
from qrecipe.errors.warn import settle
from qrecipe.execution.fx.judgement import (
    RANGES_CURE,
    Judgement,
    judge_sites,
    saturation_findings,
    wrong_kernel_findings,
)
from qrecipe.execution.fx.structure import reference_findings, structure_findings
from qrecipe.execution.packing import Kinds
from qrecipe.planning.plan import Plan
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.recipe.schema import LintTable
from qrecipe.rules.resolution import listed

FINE_DB = 20 * math.log10(2**8)
"""From here on, an output is finer than an 8-bit step, however much finer its reference is."""


DYNAMIC_TOLERANCE_DB = TOLERANCE_DB + 20 * math.log10(2)
"""Dynamic kernels use 7 bits of their input, their reference 8."""


@dataclass(frozen=True, slots=True)
class Proof:
    """A sample and how far a conversion is from float on it; ``error`` if it fails.

    ``whole`` is the full sample, to be tried if its head proves nothing.
    """

    sample: Sample
    sqnr_db: float | None
    error: str | None = None
    whole: Sample | None = None


def run_on_head(reference: fx.GraphModule, sample: Sample) -> Proof:
    """Run the reference conversion, but only on the first samples if the batch can be cut."""
    part = sample.head()
    return (
        run_on(sample, reference)
        if part is None
        else replace(run_on(part, reference), whole=sample)
    )


def run_on(sample: Sample, conversion: fx.GraphModule) -> Proof:
    """Run a conversion on the sample; it computes the same afterwards."""
    try:
        with torch.no_grad(), quiet():
            output = sample.inputs.call(conversion)
    except Exception as error:
        raise_lack_of_memory(error)
        return Proof(sample, None, first_line(error))
    return Proof(sample, output_sqnr_db(sample.output, output))


def run_until_judgeable(reference: fx.GraphModule, sample: Sample) -> Proof:
    """As `run_on_head`, and on the whole batch if the head fails or is far from float."""
    proof = run_on_head(reference, sample)
    if proof.whole is None or (proof.error is None and not _is_coarse(proof)):
        return proof
    return run_on(proof.whole, reference)


def _is_coarse(proof: Proof) -> bool:
    return proof.sqnr_db is not None and not proof.sqnr_db >= JUDGEABLE_DB


def numeric_findings(
    plan: Plan,
    converted: fx.GraphModule,
    proof: Proof,
    make_reference: Callable[[], fx.GraphModule],
    may_saturate: Collection[str],
) -> Iterator[Finding]:
    """Findings from the numbers of one batch: wrong kernels, a worse model, a doubtful scheme."""
    if not any(site.mode for site in plan.sites):
        return
    if proof.whole is not None:
        if _head_agrees(plan, converted, proof):
            return
        proof = run_on(proof.whole, make_reference())
    yield from _whole_findings(plan, converted, proof, make_reference, may_saturate)


def _whole_findings(
    plan: Plan,
    converted: fx.GraphModule,
    proof: Proof,
    make_reference: Callable[[], fx.GraphModule],
    may_saturate: Collection[str],
) -> Iterator[Finding]:
    sample, reference_db = proof.sample, proof.sqnr_db
    if proof.error is not None:
        yield _does_not_run("reference", proof.error)
        return
    lowered = run_on(sample, converted)
    lowered_db = lowered.sqnr_db
    if lowered.error is not None:
        yield _does_not_run("converted model", lowered.error)
        return
    if _agree(plan, reference_db, lowered_db):
        return
    judgement = judge_sites(plan, converted, make_reference(), sample.inputs)
    found = [*wrong_kernel_findings(plan, judgement)]
    if not found:  # kernels after a wrong one saturate on its results
        found = [*saturation_findings(plan, judgement, may_saturate)]
    yield from found
    if found or reference_db is None or lowered_db is None:
        return
    if math.isnan(lowered_db):
        yield _worse(reference_db, lowered_db)
    elif not may_saturate:  # if kernels may, worse results on this CPU say nothing
        yield from _shortfall(plan, judgement, reference_db, lowered_db)


def _shortfall(
    plan: Plan, judgement: Judgement, reference_db: float, lowered_db: float
) -> Iterator[Finding]:
    if judgement.output_db is not None and judgement.output_db < RIGHT_DB:
        yield Finding(
            "QR412",
            f"the output of the converted model is {judgement.output_db:.1f} dB from its reference "
            "although all kernels agree: torch has changed what is between them",
            hint="leave the last operations float, and report the model",
        )
    elif reference_db >= JUDGEABLE_DB and not judgement.complete:
        yield _worse(reference_db, lowered_db)
    elif lowered_db >= JUDGEABLE_DB:
        return
    elif plan.phase == "qat":
        yield Finding(
            "QR203",
            f"only {lowered_db:.1f} dB between the trained model and the converted one, on the "
            f"example inputs or the first batch of calibration; no kernel is wrong, and the "
            f"reference conversion gives {reference_db:.1f} dB",
            hint="evaluate the converted model: with reduce_range, training clips where int8 "
            "kernels do not, and inputs unlike the data say little; compile with a batch of data",
        )
    elif min(judgement.clipped.values(), default=math.inf) < lowered_db + CAUSE_DB:
        yield Finding(
            "QR203",
            f"only {lowered_db:.1f} dB against float on the first batch, which goes beyond the "
            f"calibrated range of {listed([*judgement.clipped])}: clipping alone leaves "
            f"{min(judgement.clipped.values()):.1f} dB there",
            hint=RANGES_CURE,
        )
    else:
        yield _coarse(reference_db, lowered_db)


def reference_number_findings(
    plan: Plan, proof: Proof, wrong: Mapping[str, float]
) -> Iterator[Finding]:
    """Findings from the numbers of a reference conversion that is exported."""
    if proof.error is not None:
        yield _does_not_run("reference model", proof.error)
        return
    sites = {site.name: site for site in plan.sites}
    like = "the float module with equal input and weights"
    for name, found_db in wrong.items():
        yield computes_otherwise(sites[name], "the reference module", f"{found_db:.1f} dB", like)
    if proof.sqnr_db is not None and _is_coarse(proof) and not wrong:
        yield _coarse(proof.sqnr_db, proof.sqnr_db)


def _head_agrees(plan: Plan, converted: fx.GraphModule, proof: Proof) -> bool:
    """Whether the first samples prove the model; a failure on them says nothing about the batch."""
    lowered = run_on(proof.sample, converted)
    ran = proof.error is None and lowered.error is None
    return ran and _agree(plan, proof.sqnr_db, lowered.sqnr_db)


def _agree(plan: Plan, reference_db: float | None, lowered_db: float | None) -> bool:
    """Whether the outputs prove the kernels right; outputs without floats prove nothing."""
    if reference_db is None or lowered_db is None:
        return False
    dynamic = any(site.mode == "dynamic" for site in plan.sites)
    tolerance = DYNAMIC_TOLERANCE_DB if dynamic else TOLERANCE_DB
    # the reference can be worse: it saturates where the kernel of an operation with a number
    # finds its own scale
    enough = min(reference_db - tolerance, FINE_DB)
    return lowered_db >= enough and max(reference_db, lowered_db) >= JUDGEABLE_DB


def _worse(reference_db: float, lowered_db: float) -> Finding:
    return Finding(
        "QR412",
        f"the converted model reaches {lowered_db:.1f} dB against float on the first batch, "
        f"its reference {reference_db:.1f} dB",
        hint="some kernels could not be checked one by one; try another backend",
    )


def _coarse(reference_db: float, lowered_db: float) -> Finding:
    return Finding(
        "QR203",
        f"only {lowered_db:.1f} dB against float on the first batch; no kernel is wrong, and the "
        f"reference conversion gives {reference_db:.1f} dB: the scheme is too coarse",
        hint="find the sites that cost most, leave them float or give them another observer",
    )


_WANT_BATCHES = ("Input shape must be `(N, C", "dimension of input tensor should be larger")
"""Errors of torch's quantized kernels for an input without a batch dimension."""


def _does_not_run(what: str, error: str) -> Finding:
    hint = "leave the failing operation float, and report the model"
    if any(text in error for text in _WANT_BATCHES):
        hint = "quantized kernels need a batch dimension, unlike float ones: x.unsqueeze(0)"
    return Finding("QR413", f"the {what} fails on the first batch: {error}", hint=hint)


def audit(
    plan: Plan,
    converted: fx.GraphModule,
    proof: Proof,
    make_reference: Callable[[], fx.GraphModule],
    lint: LintTable,
    may_saturate: Collection[str],
    kinds: Kinds,
) -> None:
    """Compare structure and numbers with the plan.

    The kernels of ``may_saturate`` are for another CPU, and checked without saturation; ``kinds``
    is what their weights were packed from.

    Raises ``AuditError`` if they differ; warns if the scheme alone explains low accuracy.
    """
    structure = structure_findings(plan, converted, kinds)
    _judge(structure, numeric_findings(plan, converted, proof, make_reference, may_saturate), lint)


def audit_reference(
    plan: Plan,
    reference: fx.GraphModule,
    proof: Proof,
    wrong: Mapping[str, float],
    lint: LintTable,
) -> None:
    """The same for a reference conversion that is exported.

    ``wrong`` are sites that differ from the prepared model's float module on the same input, with
    their SQNR in dB.
    """
    structure = reference_findings(plan, reference)
    _judge(structure, reference_number_findings(plan, proof, wrong), lint)


def _judge(structure: Iterator[Finding], numbers: Iterator[Finding], lint: LintTable) -> None:
    """Settle what differs in structure, and only if nothing does, what differs in numbers."""
    try:
        findings = list(structure) or list(numbers)
    except QRecipeError:
        raise
    except Exception as error:
        raise AuditError.of(
            "QR413", f"the converted model cannot be audited: {first_line(error)}"
        ) from error
    settle(findings, lint.ignore)
