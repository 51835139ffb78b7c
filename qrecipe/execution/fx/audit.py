"""The audit of a converted model; differences from the plan are raised as one error."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from torch import fx

from qrecipe.errors.findings import CODES, AuditError, Finding, QRecipeError, error_from
from qrecipe.errors.text import first_line
from qrecipe.errors.warn import warn
from qrecipe.execution.fx.numerics import ReferenceRun, numeric_findings, reference_number_findings
from qrecipe.execution.fx.reference_form import reference_findings
from qrecipe.execution.fx.structure import structure_findings
from qrecipe.planning.plan import Plan
from qrecipe.recipe.schema import LintTable


def audit(
    plan: Plan,
    converted: fx.GraphModule,
    proof: ReferenceRun,
    make_reference: Callable[[], fx.GraphModule],
    lint: LintTable,
    may_saturate: Collection[str],
) -> None:
    """Compare structure and numbers with the plan.

    The kernels of ``may_saturate`` are for another CPU, and checked without saturation.

    Raises ``AuditError`` if they differ; warns if the scheme alone explains low accuracy.
    """

    def found() -> Iterator[Finding]:
        structure = list(structure_findings(plan, converted))
        yield from structure or numeric_findings(
            plan, converted, proof, make_reference, may_saturate
        )

    _judge(found(), lint)


def audit_reference(
    plan: Plan,
    reference: fx.GraphModule,
    proof: ReferenceRun,
    wrong: Mapping[str, float],
    lint: LintTable,
) -> None:
    """The same for a reference conversion that is exported.

    ``wrong`` are sites that differ from the prepared model's float module on the same input, with
    their SQNR in dB.
    """

    def found() -> Iterator[Finding]:
        structure = list(reference_findings(plan, reference))
        yield from structure or reference_number_findings(plan, proof, wrong)

    _judge(found(), lint)


def _judge(found: Iterable[Finding], lint: LintTable) -> None:
    try:
        findings = list(found)
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
        warn(finding, lint.ignore)
