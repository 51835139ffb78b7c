"""The sites of an untraced model, each quantized alone, module by module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from qrecipe.execution.eager.part import EagerPart
from qrecipe.measure.sensitivity.isolated_sites import Kernel
from qrecipe.model.call import Inputs
from qrecipe.model.copies import runnable_copy
from qrecipe.planning.plan import Plan, Site
from qrecipe.recipe.schema import LintTable

_SILENT = LintTable(ignore=("QR203",))


@dataclass(frozen=True, slots=True)
class ModuleSite:
    """A site that is a module of the model, under one or several names."""

    site: Site
    original: nn.Module
    owner: nn.Module
    names: tuple[str, ...]

    def put(self, module: nn.Module) -> None:
        """Make the model call ``module`` at this site."""
        for name in self.names:
            self.owner.set_submodule(name, module)


def module_sites(model: nn.Module, plan: Plan, sites: Iterable[Site]) -> tuple[ModuleSite, ...]:
    """The sites in a copy of the model, their ``owner``, in eval mode."""
    owner = runnable_copy(model)
    aliases = plan.structure.aliases
    return tuple(
        ModuleSite(
            site,
            owner.get_submodule(site.name),
            owner,
            (site.name, *(alias for alias, path in aliases.items() if path == site.name)),
        )
        for site in sites
    )


def module_kernels(
    model: nn.Module, plan: Plan, sites: Iterable[Site], inputs: Inputs
) -> Mapping[str, Kernel]:
    """The quantized module of each site by name, each converted and audited alone.

    Nothing is calibrated: untraced models are quantized dynamically or weight-only.
    """
    found = {}
    for site in sites:
        part = EagerPart("", _alone(plan, site), model, inputs)
        converted = part.convert(part.prepare(), None, _SILENT)
        found[site.name] = Kernel(site.name, converted.get_submodule(site.name))
    return found


def _alone(plan: Plan, only: Site) -> Plan:
    sites = (
        site if site is only else replace(site, verdict="float", mode=None, qconfig=None)
        for site in plan.sites
    )
    return replace(plan, sites=tuple(sites))
