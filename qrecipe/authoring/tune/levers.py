"""What a search can change in a recipe: levers without a cost in time, and float sites."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qrecipe.errors.findings import RecipeError
from qrecipe.errors.short import ShortRepr
from qrecipe.planning.plan import Plan
from qrecipe.planning.target_cpu import TargetCpu, target_has_vnni
from qrecipe.recipe.frozen import FrozenMapping
from qrecipe.recipe.overlay import overlay_recipe
from qrecipe.recipe.recipe import Recipe
from qrecipe.recipe.schema import Constructor, TensorSpec

_ON_X86 = ("x86", "fbgemm", "onednn")
_EIGHT_BITS = ("int8", "uint8")
_EXTREMES = ("minmax", "moving_average_minmax", "mean_minmax", "mse")

_OBSERVERS = ("histogram", "mse", "mean_minmax", "minmax", "moving_average_minmax")
"""No rule for ranges wins everywhere, so the user's metric decides."""


@dataclass(frozen=True, slots=True, repr=False)
class Lever(ShortRepr):
    """A change to how tensors are quantized: the keys that it sets, by tensor name."""

    what: str
    tensors: Mapping[str, Mapping[str, Any]] = field(hash=False)

    def overrides(self, other: Lever) -> bool:
        """Whether it sets all keys that another one sets."""
        return all(
            keys.keys() <= self.tensors.get(name, {}).keys() for name, keys in other.tensors.items()
        )


@dataclass(frozen=True, slots=True, repr=False)
class Candidate(ShortRepr):
    """A recipe to try: the base with these levers and these float sites."""

    levers: tuple[Lever, ...] = ()
    floats: frozenset[str] = field(default_factory=frozenset)

    def with_lever(self, lever: Lever) -> Candidate:
        """The candidate with one more lever, which replaces those that set the same keys."""
        kept = (each for each in self.levers if not lever.overrides(each))
        return replace(self, levers=(*kept, lever))

    @property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """All keys that the levers set, by tensor name."""
        found: dict[str, dict[str, Any]] = {}
        for lever in self.levers:
            for name, keys in lever.tensors.items():
                found.setdefault(name, {}).update(keys)
        return found


def digest_of(candidate: Candidate) -> str:
    """Identifies a candidate without its recipe."""
    parts = [*(lever.what for lever in candidate.levers), *sorted(candidate.floats)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def levers_of(recipe: Recipe, plan: Plan, target_cpu: TargetCpu) -> tuple[Lever, ...]:
    """The levers that change the recipe, in the order in which they are tried.

    They cost no time; using the eighth bit is only free on a CPU with VNNI and ties the recipe to
    such CPUs.
    """
    levers = _levers(recipe, plan, target_cpu)
    return tuple(lever for lever in levers if lever.tensors and _fits(recipe, lever))


def _levers(recipe: Recipe, plan: Plan, target_cpu: TargetCpu) -> Iterator[Lever]:
    weights, activations = _roles(recipe, plan)
    for observer in _OBSERVERS:
        yield _lever(
            f"{observer} observer for activations",
            {
                name: {"observer": observer}
                for name, spec in activations.items()
                if _takes_extremes(spec) and spec.observer != Constructor(name=observer)
            },
        )
    if target_has_vnni(target_cpu) and recipe.backend in _ON_X86:
        yield _lever(
            "all 8 bits for activations (needs a CPU with VNNI)",
            {name: {"reduce_range": False} for name, s in activations.items() if s.reduce_range},
        )
    yield _lever(
        "a range per channel for weights",
        {
            name: {"observer": "per_channel_minmax", "qscheme": "per_channel_symmetric"}
            for name, spec in weights.items()
            if spec.dtype in ("int8", "int4") and spec.is_per_tensor
        },
    )


def _lever(what: str, tensors: Mapping[str, Mapping[str, Any]]) -> Lever:
    return Lever(what, FrozenMapping({name: FrozenMapping(tensors[name]) for name in tensors}))


def _roles(recipe: Recipe, plan: Plan) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """The tensor specs of weights and of static activations in the plan, by name."""
    winners = {site.rule for site in plan if site.verdict == "quantized"}
    qconfigs = [rule.qconfig for rule in recipe.rules if rule.as_written in winners]
    weights = {q.weight for q in qconfigs if q is not None and q.weight is not None}
    activations = {q.activation for q in qconfigs if q is not None and q.activation is not None}
    named = recipe.tensors.items()
    return (
        {name: spec for name, spec in named if spec in weights - activations},
        {
            name: spec
            for name, spec in named
            if spec in activations - weights and not spec.is_dynamic and spec.dtype in _EIGHT_BITS
        },
    )


def _takes_extremes(spec: TensorSpec) -> bool:
    """Whether a torch observer of extremes finds the range; a plugin's is the author's choice."""
    return spec.observer is not None and spec.observer.name in _EXTREMES


def _fits(recipe: Recipe, lever: Lever) -> bool:
    try:
        overlay_recipe(recipe, {"tensor": lever.tensors})
    except RecipeError:
        return False  # it contradicts another key of the tensor
    return True
