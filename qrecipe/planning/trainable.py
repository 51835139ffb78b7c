"""What training changes about a plan: modules that it cannot share, branches that it ignores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qrecipe.errors.findings import Finding
from qrecipe.model.graph_sites import Inventory
from qrecipe.planning.backend import Outcome
from qrecipe.recipe.patterns import leave_float
from qrecipe.rules.resolution import Decision
from qrecipe.rules.structure import Member, Operation


def shared_norm_findings(
    inventory: Inventory, decisions: Mapping[str, Decision], outcome_of: Mapping[str, Outcome]
) -> Iterator[Finding]:
    """Quantized modules that are called several times and fused with a BatchNorm (QR312).

    Every call would update the statistics of the BatchNorm, which scale the weight of all calls.
    """
    calls: dict[str, list[Operation]] = {}
    for operation in inventory.structure.operations:
        for member in _with_tensors(operation):
            if member.module is not None:
                calls.setdefault(member.module, []).append(operation)
    for module, operations in calls.items():
        fused = [operation for operation in operations if _has_norm(operation)]
        quantized = [name for op in fused if outcome_of[name := op.name].qconfig is not None]
        if len(operations) > 1 and quantized:
            yield Finding(
                "QR312",
                f"{module} is called {len(operations)} times and fused with a BatchNorm at "
                f"{quantized[0]}: training cannot share it",
                decisions[quantized[0]].rule.location,
                hint=f"{leave_float(quantized[0])}, or give each call its own module",
            )


def _with_tensors(operation: Operation) -> list[Member]:
    """The members that may have weights or statistics; those after them only compute."""
    first, *others = operation.members
    return [first, *(member for member in others if member.op.startswith("BatchNorm"))]


def _has_norm(operation: Operation) -> bool:
    return len(operation.members) > 1 and any(
        member.op.startswith("BatchNorm") for member in operation.members
    )


def branch_findings(inventory: Inventory) -> Iterator[Finding]:
    """Forwards that behave differently in training mode, which the graph ignores (QR205)."""
    for path in inventory.trained_otherwise:
        where = f"the forward of {path}" if path else "the model's own forward"
        yield Finding(
            "QR205",
            f"{where} behaves differently in training mode; only its eval branch is trained",
            hint="outputs that only exist in training mode are not available for a loss",
        )
