"""What a recipe is suggested for: a model's sites and the work in each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qrecipe.audit.moving_averages import MANY_BATCHES
from qrecipe.model.graph_sites import Inventory
from qrecipe.model.work import Work, nearest

Scheme = Literal["static", "dynamic", "mixed"]

_RECURRENT = ("LSTM", "GRU", "LSTMCell", "GRUCell", "RNNCell")


@dataclass(frozen=True, slots=True)
class Subject:
    """A model's sites and work, and the roots if only those can be traced.

    ``work_of_sites`` counts multiplications with weights by site; ``untraced`` says why the model
    is not traced as a whole; ``num_batches`` is the number of calibration batches, if known.
    """

    inventory: Inventory
    work: Work
    work_of_sites: Mapping[str, int]
    roots: tuple[str, ...] = ()
    untraced: str | None = None
    num_batches: int | None = None

    @property
    def has_few_batches(self) -> bool:
        return self.num_batches is not None and self.num_batches < MANY_BATCHES

    @property
    def has_recurrent_layers(self) -> bool:
        return self.has(_RECURRENT)

    def has(self, kinds: Sequence[str]) -> bool:
        """Whether an operation has one of these kinds, alone or at the head of a group."""
        return any(op.partition("+")[0] in kinds for op in self._ops)

    @property
    def _ops(self) -> Iterator[str]:
        return (operation.op for operation in self.inventory.structure.operations)

    @property
    def work_elsewhere(self) -> Mapping[str, int]:
        """The work outside all sites, by innermost module ("": the model's own forward)."""
        if not self.roots and self.inventory.untraced is None:
            return {}
        inside = self.roots or tuple(self.inventory.matches)
        return {
            path: count for path, count in self.work.places.items() if nearest(path, inside) is None
        }
