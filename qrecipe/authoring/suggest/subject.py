"""What a recipe is suggested for: a model's sites and the work in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from qrecipe.audit.moving_averages import MANY_BATCHES
from qrecipe.model.graph_sites import Inventory
from qrecipe.model.work import Work, nearest
from qrecipe.planning.plan import Plan
from qrecipe.recipe.schema import Executor

Scheme = Literal["static", "dynamic", "mixed", "float16"]

MOST = 0.5
"""Below this share of the work in quantized operations a recipe does little."""

_RECURRENT = ("LSTM", "GRU", "LSTMCell", "GRUCell", "RNNCell")


@dataclass(frozen=True, slots=True)
class Remedy:
    """A transform with its settings, and why the model needs it."""

    name: str
    settings: Mapping[str, Any]
    reason: str


@dataclass(frozen=True, slots=True)
class Subject:
    """A model's sites and work, the roots if only those can be traced, and who executes it.

    ``work_of_sites`` counts multiplications with weights by site; ``reasons`` say why the model is
    not taken as a whole, and what was tried in vain; ``num_batches`` is the number of calibration
    batches, if known; ``remedies`` are the transforms that it needs.
    """

    inventory: Inventory
    work: Work
    work_of_sites: Mapping[str, int]
    roots: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    num_batches: int | None = None
    executor: Executor | None = None
    remedies: tuple[Remedy, ...] = ()

    def covered(self, plan: Plan) -> float:
        """The share of the work in quantized operations, 0 to 1; 1 if there is none."""
        quantized = (site.name for site in plan.sites if site.verdict == "quantized")
        done = sum(self.work_of_sites.get(name, 0) for name in quantized)
        return done / self.work.total if self.work.total else 1.0

    @property
    def has_few_batches(self) -> bool:
        return self.num_batches is not None and self.num_batches < MANY_BATCHES

    @property
    def has_recurrent_layers(self) -> bool:
        return self.has(_RECURRENT)

    def has(self, kinds: Sequence[str]) -> bool:
        """Whether an operation has one of these kinds, alone or at the head of a group."""
        operations = self.inventory.structure.operations
        return any(operation.op.partition("+")[0] in kinds for operation in operations)

    @property
    def work_elsewhere(self) -> Mapping[str, int]:
        """The work outside all sites, by innermost module ("": the model's own forward)."""
        if not self.roots and self.inventory.untraced is None:
            return {}
        inside = self.roots or tuple(self.inventory.matches)
        return {
            path: count for path, count in self.work.places.items() if nearest(path, inside) is None
        }
