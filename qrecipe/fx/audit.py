"""The proof that a converted model is what the plan says, raised as one error where it is not."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import fx

from qrecipe.errors import CODES, AuditError, Finding, QRecipeError, error_from, first_line
from qrecipe.fx.numerics import ReferenceRun, numeric_findings
from qrecipe.fx.structure import structure_findings
from qrecipe.linting import warn
from qrecipe.planning import Plan
from qrecipe.schema import LintTable


def audit(
    plan: Plan,
    converted: fx.GraphModule,
    proof: ReferenceRun,
    make_reference: Callable[[], fx.GraphModule],
    lint: LintTable,
    may_saturate: Collection[str],
) -> None:
    """Compare structure and numbers with the plan.

    The kernels of ``may_saturate`` are made for another CPU, and judged without saturation.

    Raises ``AuditError`` where they differ; warns where the scheme alone explains low accuracy.
    """
    try:
        findings = list(structure_findings(plan, converted))
        if not findings:
            findings = list(numeric_findings(plan, converted, proof, make_reference, may_saturate))
    except QRecipeError:
        raise
    except Exception as error:
        raise AuditError(
            Finding("QR413", f"the converted model cannot be audited: {first_line(error)}")
        ) from error
    errors = [finding for finding in findings if CODES[finding.code].error is not None]
    if errors:
        raise error_from(errors)
    for finding in findings:
        warn(finding, lint)
