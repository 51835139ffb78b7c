"""What FX graph mode is given beside a graph and the rules for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qrecipe._torch_fx import BackendConfig, ConvertCustomConfig, PrepareCustomConfig
from qrecipe.planning.backend import own_backend_config
from qrecipe.planning.plan import Plan
from qrecipe.recipe.schema import Backend, Phase


@dataclass(frozen=True, slots=True)
class Configs:
    """The same for all parts of a model.

    ``preserved`` are the attributes of the model that are kept on its graphs.
    """

    backend: Backend
    phase: Phase
    backend_config: BackendConfig
    prepare: PrepareCustomConfig
    convert: ConvertCustomConfig
    preserved: Mapping[str, Any]

    @classmethod
    def of(cls, plan: Plan, model: nn.Module, preserved: Sequence[str] = ()) -> Configs:
        """The configs for a plan, which was made by the same backend config."""
        return cls(
            plan.backend,
            plan.phase,
            own_backend_config(plan.backend, plan.phase),
            PrepareCustomConfig().set_preserved_attributes(list(preserved)),
            ConvertCustomConfig().set_preserved_attributes(list(preserved)),
            {name: getattr(model, name) for name in preserved},
        )
