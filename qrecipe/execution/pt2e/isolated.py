"""Programs in which a single site is quantized, for rankings of sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from qrecipe.audit.ranges import check_ranges
from qrecipe.errors.findings import Finding, UnsupportedError
from qrecipe.errors.warn import settle
from qrecipe.execution.isolated import Calibrate, Isolated, Kernel, LoneSite, plan_of_one
from qrecipe.execution.part import Task
from qrecipe.execution.prepared import mark_prepared
from qrecipe.execution.pt2e.part import ProgramPart, converted_program, prepared_program
from qrecipe.execution.pt2e.structure import structure_findings
from qrecipe.planning.plan import Site


def isolated_programs(task: Task, sites: Sequence[Site], calibrate: Calibrate) -> Isolated:
    """The whole model as a program for each site, which all are calibrated together.

    Raises ``UnsupportedError`` (QR316) for a model with ``[fx] roots``.
    """
    part, *others = task.inventory.parts
    if part.path or others:
        message = 'roots are not ranked by executor = "pt2e"'
        raise UnsupportedError(Finding("QR316", message, hint='remove [fx] roots, or set "fx"'))
    program = ProgramPart.of(task, part).program
    plans = {site.name: plan_of_one(site, task.plan) for site in sites}
    prepared = {name: prepared_program(program, plan) for name, plan in plans.items()}
    together = _Together(program, list(prepared.values()))
    mark_prepared(together, task.recipe, "sensitivity", [])
    calibrate(together)
    check_ranges(prepared.values())
    kernels: dict[str, Kernel] = {}
    for name, plan in plans.items():
        converted = converted_program(prepared[name], plan)
        settle(structure_findings(plan, program, converted), ())
        kernels[name] = Kernel(name, converted)
    owner = _Together(program, [])
    return Isolated(
        owner, [LoneSite(site, program, owner, ("program",)) for site in sites], kernels
    )


class _Together(nn.Module):
    """A program, with others that see the same inputs."""

    def __init__(self, program: nn.Module, others: Sequence[nn.Module]) -> None:
        super().__init__()
        self.program, self.others = program, nn.ModuleList(others)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for other in self.others:
            other(*args, **kwargs)
        return self.program(*args, **kwargs)
