"""The sites of an untraced model, each quantized alone, module by module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qrecipe.execution.eager.part import EagerPart
from qrecipe.execution.isolated import Calibrate, Isolated, Kernel, LoneSite
from qrecipe.execution.part import Task
from qrecipe.model.copies import runnable_copy
from qrecipe.planning.plan import Plan, Site
from qrecipe.recipe.schema import LintTable

_SILENT = LintTable(ignore=("QR203",))


def isolated(task: Task, sites: Sequence[Site], calibrate: Calibrate) -> Isolated:
    """Modules of a copy of the model, and a quantized one for each, converted and audited alone.

    Nothing is calibrated: untraced models are quantized dynamically or weight-only.
    """
    owner = runnable_copy(task.model)
    aliases = task.plan.structure.aliases
    lone = [
        LoneSite(
            site,
            owner.get_submodule(site.name),
            owner,
            (site.name, *(alias for alias, path in aliases.items() if path == site.name)),
        )
        for site in sites
    ]
    return Isolated(owner, lone, {site.name: _kernel(task, site) for site in sites})


def _kernel(task: Task, site: Site) -> Kernel:
    part = EagerPart(_alone(task.plan, site), task.model, task.inputs)
    converted = part.convert(part.prepare(), None, _SILENT)
    return Kernel(site.name, converted.get_submodule(site.name))


def _alone(plan: Plan, only: Site) -> Plan:
    sites = (
        site if site is only else replace(site, verdict="float", mode=None, qconfig=None)
        for site in plan.sites
    )
    return replace(plan, sites=tuple(sites))
