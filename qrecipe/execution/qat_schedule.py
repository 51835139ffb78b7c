"""The schedule of quantization-aware training, as a torch learning-rate scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from qrecipe.errors.findings import PlanError
from qrecipe.execution.fake_quants import freeze_batch_norm, stop_observing
from qrecipe.execution.prepared import PreparedState, prepared_state
from qrecipe.recipe.schema import QatTable

_FACTORS: Mapping[Literal["cosine", "linear", "constant"], Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
"""The learning rate as a fraction of the initial one, by the fraction of training done."""


class QatSchedule(LRScheduler):
    """Anneals the learning rate, and freezes ranges and BatchNorm statistics on the way.

    Call ``step()`` once per batch, after ``optimizer.step()``. After ``total_steps`` the rate stays
    constant. ``state_dict`` has the position; loading it freezes again what was frozen.
    """

    def __init__(
        self, prepared: nn.Module, optimizer: Optimizer, table: QatTable, original_steps: int
    ) -> None:
        self.total_steps = math.ceil(original_steps * table.epochs_fraction)
        # not before the first batch, when there is no range yet
        self.disable_observer_at = max(
            1, math.ceil(self.total_steps * table.disable_observer_after)
        )
        self.freeze_batch_norm_at = math.ceil(self.total_steps * table.freeze_batch_norm_after)
        self._table = table
        self._prepared = prepared
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The learning rates of the optimizer's groups at this step."""
        done = min(1.0, self.last_epoch / self.total_steps)
        factor = self._table.learning_rate_fraction * _FACTORS[self._table.schedule](done)
        return [rate * factor for rate in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Advance by one batch."""
        super().step(epoch)
        self._freeze()

    def state_dict(self) -> dict[str, Any]:
        """The position as plain values; model and optimizer have their own state."""
        state: dict[str, Any] = super().state_dict()
        return {key: value for key, value in state.items() if key not in ("_prepared", "_table")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume a schedule of the same length.

        Raises ``PlanError`` (QR313) if the length differs.
        """
        steps = state_dict.get("total_steps") if isinstance(state_dict, Mapping) else None
        if steps != self.total_steps:
            raise PlanError.of(
                "QR313",
                f"the state is from a schedule of {steps} steps, not of {self.total_steps}",
                hint="resume with the original_steps and recipe that training started with",
            )
        super().load_state_dict(state_dict)
        self._freeze()

    def _freeze(self) -> None:
        if self.last_epoch >= self.disable_observer_at:
            stop_observing(self._prepared)
        if self.last_epoch >= self.freeze_batch_norm_at:
            freeze_batch_norm(self._prepared)


def qat_schedule(prepared: nn.Module, optimizer: Optimizer, *, original_steps: int) -> QatSchedule:
    """The scheduler that applies the recipe's ``[qat]`` table to your training loop.

    ``prepared`` is the model from `CompiledRecipe.prepare`, or its wrapper (such as DataParallel);
    ``optimizer`` has the *initial* learning rates of the original training, which the schedule
    scales by the recipe's fraction; ``original_steps`` is the number of batches of the original
    training, all epochs together. Train for ``total_steps`` batches.

    Raises:
        CalibrationError: ``prepared`` was not prepared by qrecipe (QR406).
        PlanError: it was not prepared for training (QR308), or the number of steps is not positive
            (QR313), or the optimizer has none of its parameters (QR313).
    """
    state, inner = _unwrapped(prepared)
    if state.qat is None:
        raise PlanError.of(
            "QR308",
            "the model was prepared for calibration, not for training",
            hint='set phase = "qat" in the recipe',
        )
    if not isinstance(original_steps, Integral) or original_steps < 1:
        raise PlanError.of(
            "QR313",
            f"original_steps is {original_steps!r}, not a positive number of batches",
            hint="epochs * len(loader) of the original training",
        )
    _check_optimizer(optimizer, prepared)
    return QatSchedule(inner, optimizer, state.qat, int(original_steps))


def _check_optimizer(optimizer: object, prepared: nn.Module) -> None:
    """Raises ``PlanError`` (QR313) if it would not train the model, as that of its original."""
    hint = "create it from the prepared model: torch.optim.SGD(prepared.parameters(), lr=...)"
    if not isinstance(optimizer, Optimizer):
        kind = type(optimizer).__name__
        raise PlanError.of("QR313", f"the optimizer is a {kind}, not one of torch", hint=hint)
    own = {id(parameter) for parameter in prepared.parameters()}
    trained = [each for group in optimizer.param_groups for each in group["params"]]
    if own.isdisjoint(map(id, trained)):
        text = "the optimizer has no parameter of the prepared model, which is a copy"
        raise PlanError.of("QR313", text, hint=hint)


def _unwrapped(prepared: nn.Module) -> tuple[PreparedState, nn.Module]:
    """The prepared model, itself or as the ``module`` of a wrapper."""
    inner = getattr(prepared, "module", None)
    if isinstance(inner, nn.Module) and "meta" not in vars(prepared):
        return _unwrapped(inner)
    return prepared_state(prepared), prepared
