"""A plan as it is stored."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from qrecipe.model.record import Stored
from qrecipe.recipe.recipe import Ingredient
from qrecipe.recipe.references import Publisher
from qrecipe.recipe.schema import Backend, Phase, TensorSpec


class StoredInPart(BaseModel):
    """A table of which only a part is needed."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class StoredQConfig(StoredInPart):
    """The specs of a site's weight and activation."""

    weight: TensorSpec | None
    activation: TensorSpec | None


class StoredRule(StoredInPart):
    """The rule that decided a site."""

    tier: Literal["module_name", "module_type", "function", "global"]
    key: str
    says: str
    reason: str | None


class StoredSite(StoredInPart):
    """A site of the stored plan."""

    name: str
    op: str
    members: tuple[str, ...]
    verdict: Literal["quantized", "passthrough", "float"]
    mode: Literal["static", "dynamic", "weight_only"] | None
    reason: str | None
    engine: Literal["fbgemm", "onednn"] | None
    qconfig: StoredQConfig | None
    rule: StoredRule

    @model_validator(mode="after")
    def _float_has_no_mode(self) -> Self:
        if (self.verdict == "float") != (self.mode is None):
            raise PydanticCustomError("mode_of_float", "a verdict and a mode that differ")
        return self


class StoredIngredient(StoredInPart):
    """A file that the recipe was made of, and the distribution that published it, if one did."""

    name: str
    fingerprint: str
    distribution: str | None
    version: str | None


class StoredPlan(StoredInPart):
    """What of a plan decides how a model is converted, and what its recipe was made of."""

    recipe: str
    fingerprint: str
    ingredients: tuple[StoredIngredient, ...] = ()
    backend: Backend
    phase: Phase
    executor: Literal["fx", "eager"]
    needs_vnni: bool
    is_for_export: bool
    boundaries: int
    sites: tuple[StoredSite, ...]


class Needs(Stored):
    """What the machine that runs the model has to have.

    ``engines`` are those of torch, the backend's own and those of single sites; ``vnni`` tells
    that the kernels can saturate on an x86 CPU without VNNI.
    """

    engines: tuple[str, ...]
    vnni: bool


def needs_of(plan: StoredPlan) -> Needs:
    """What a machine needs for the model of a plan."""
    engines = [plan.backend, *(site.engine for site in plan.sites if site.engine is not None)]
    return Needs(engines=tuple(dict.fromkeys(engines)), vnni=plan.needs_vnni)


def ingredients_of(plan: StoredPlan) -> tuple[Ingredient, ...]:
    """What the recipe of a stored plan was made of; nothing where an older qrecipe stored it."""
    return tuple(
        Ingredient(
            each.name,
            each.fingerprint,
            None
            if each.distribution is None or each.version is None
            else Publisher(each.distribution, each.version),
        )
        for each in plan.ingredients
    )
