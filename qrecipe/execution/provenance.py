"""The provenance of a converted model, kept with the model."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from qrecipe._version import __version__
from qrecipe.errors.text import one_line
from qrecipe.model.kept import PROVENANCE, kept_with, required
from qrecipe.model.record import Architecture
from qrecipe.observers.loading import plugin_versions
from qrecipe.planning.cpu import cpu_name
from qrecipe.planning.plan import Plan
from qrecipe.planning.text import site_table
from qrecipe.recipe.frozen import FrozenMapping
from qrecipe.recipe.recipe import Recipe
from qrecipe.terminal.report import Listing, Report, Section, Table

_ARCHITECTURE = "architecture"


@dataclass(frozen=True, slots=True, repr=False)
class Provenance(Report):
    """The resolved recipe as TOML, its fingerprint, the plan as JSON, and the versions.

    ``versions`` are those of qrecipe, torch, Python, and the distributions of plugins and of
    published recipes that the recipe uses. ``cpu`` is the kind of CPU that converted the model;
    ``unjudged`` are the sites that it could not check with all 8 bits.
    """

    recipe: str
    fingerprint: str
    plan: str
    versions: Mapping[str, str]
    cpu: str = ""
    unjudged: tuple[str, ...] = ()

    def _sections(self) -> Iterator[Section]:
        return origin_sections(self)


def make_provenance(recipe: Recipe, plan: Plan, unjudged: tuple[str, ...]) -> Provenance:
    """The provenance of a model that is converted now by this plan."""
    publishers = [each.publisher for each in plan.ingredients if each.publisher is not None]
    versions = {
        **plugin_versions(recipe),
        **{publisher.name: publisher.version for publisher in publishers},
        "qrecipe": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return Provenance(
        recipe.to_toml(),
        recipe.fingerprint,
        plan.to_json(),
        FrozenMapping(versions),
        cpu_name(),
        unjudged,
    )


def attach(converted: nn.Module, provenance: Provenance, architecture: Architecture) -> None:
    """Attach both to the model; copies of the model keep them too."""
    kept_with(converted).update({PROVENANCE: provenance, _ARCHITECTURE: architecture})


def keep_provenance(compiled: nn.Module, converted: nn.Module) -> None:
    """Attach the provenance of a converted model to what a compiler made of it."""
    kept_with(compiled)[PROVENANCE] = provenance(converted)


def architecture(converted: nn.Module) -> Architecture:
    """The architecture that a converted model was made from.

    Raises ``ArtifactError`` (QR501) as `provenance` does, and for a compiled model.
    """
    provenance(converted)
    what = "is compiled: its sites cannot be told apart"
    hint = "pass the model that it was compiled from"
    return required(converted, _ARCHITECTURE, Architecture, what, hint)


def converted_graphs(converted: nn.Module) -> dict[str, fx.GraphModule]:
    """The graphs in a converted model by the paths of their parts; none where it is untraced.

    Raises ``ArtifactError`` (QR501) as `provenance` does.
    """
    modules: Any = converted
    return {part.path: modules.get_submodule(part.path) for part in architecture(converted).parts}


def provenance(converted: nn.Module) -> Provenance:
    """Recipe, fingerprint, plan and versions of a model that qrecipe converted.

    Raises ``ArtifactError`` (QR501) for any other model.
    """
    hint = "pass the model that qrecipe.quantize or CompiledRecipe.convert returned"
    return required(converted, PROVENANCE, Provenance, "was not converted by qrecipe", hint)


def origin_sections(origin: Provenance) -> Iterator[Section]:
    """The plan, the recipe and the versions."""
    plan = stored_plan(origin)
    caption = f"{plan.backend} ({plan.phase}), {plan.executor}: {len(plan)} sites"
    yield site_table(plan.sites, "Plan", caption)
    yield Listing("Recipe", origin.recipe)
    made_of = [each for each in plan.ingredients if each.publisher is not None]
    versions = [
        ("fingerprint of the recipe", origin.fingerprint),
        *((one_line(each.name), str(each.publisher)) for each in made_of),
        *sorted(origin.versions.items(), key=_version_order),
    ]
    yield Table("Versions", ("", "version"), versions)


def _version_order(version: tuple[str, str]) -> tuple[int, str]:
    """The sort key of versions: a stored file has them by name, a model in memory does not."""
    name, _ = version
    first = ("qrecipe", "torch", "python")
    return (first.index(name) if name in first else len(first), name)


def stored_plan(origin: Provenance) -> Plan:
    """The plan by which a model was converted."""
    # parsed and checked, since the plan of a loaded model comes from a file
    return Plan.from_json(origin.plan)
