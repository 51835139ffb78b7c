"""Trying a candidate: it is quantized, evaluated and timed, here or in a worker."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from qrecipe.authoring.tune.search import Measured
from qrecipe.errors.findings import QRecipeError
from qrecipe.errors.text import first_line
from qrecipe.execution.batches import Forward, peek
from qrecipe.execution.calls import calls_of
from qrecipe.measure.sensitivity.scores import number
from qrecipe.measure.sensitivity.steps import Evaluate
from qrecipe.measure.turns import Latency, compare_latency
from qrecipe.model.copies import runnable_copy
from qrecipe.pipeline import simulate
from qrecipe.planning.target_cpu import TargetCpu
from qrecipe.pool.parcel import Compute
from qrecipe.recipe.overlay import overlay_recipe
from qrecipe.recipe.recipe import Recipe

Values = Mapping[str, Any]
"""What the recipe of a candidate adds to the base, as plain values."""


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of a candidate; ``error`` is why there is no metric, where one was raised.

    ``was_made`` tells that the evaluation raised it, and not quantization.
    """

    measured: Measured
    error: QRecipeError | None = None
    was_made: bool = True


@dataclass(frozen=True, slots=True)
class Trying:
    """A model and its evaluation; ``recipe`` is the one that the candidates extend."""

    model: nn.Module
    recipe: Recipe
    evaluate: Evaluate
    forward: Forward | None
    target_cpu: TargetCpu

    def begun(self, batches: Sequence[Any]) -> Compute:
        """Tries pieces in a worker: the values of a candidate after a key."""

        def compute(piece: tuple[str, Values]) -> Tried:
            return self.tried(overlay_recipe(self.recipe, piece[1]), batches)

        return compute

    def tried(self, recipe: Recipe, batches: Iterable[Any]) -> Tried:
        """Quantize, evaluate and time the model."""
        start = time.monotonic()

        def failed(error: QRecipeError, was_made: bool) -> Tried:
            seconds = time.monotonic() - start
            return Tried(Measured(None, seconds, first_line(error)), error, was_made)

        try:
            converted = self.made(simulate, recipe, batches)
        except QRecipeError as error:
            return failed(error, was_made=False)
        try:
            metric = accuracy(self.evaluate, converted)
        except QRecipeError as error:
            return failed(error, was_made=True)
        seconds = time.monotonic() - start
        if not math.isfinite(metric):
            return Tried(Measured(None, seconds, "evaluate returns no finite number"))
        latency = self._latency(converted, batches)
        if latency is None:
            return Tried(Measured(metric, seconds))
        speed = latency.speed
        return Tried(Measured(metric, seconds, None, 1 / speed.median, speed.is_slower))

    def made(
        self, make: Callable[..., nn.Module], recipe: Recipe, batches: Iterable[Any]
    ) -> nn.Module:
        """The model by a step of the pipeline, such as `qrecipe.quantize`."""
        return make(
            self.model,
            replace(recipe, phase="ptq"),  # a recipe for training is tuned without it
            batches,
            forward=self.forward,
            progress=False,
            target_cpu=self.target_cpu,
        )

    def _latency(self, converted: nn.Module, batches: Iterable[Any]) -> Latency | None:
        """Against the float model; None if the kernels are those of another CPU."""
        if self.target_cpu != "this":
            return None
        plain, (first, _) = runnable_copy(self.model), peek(batches)
        inputs = calls_of(plain, first, 0, self.forward)[0].inputs
        return compare_latency(plain, converted, inputs, budget=0.0)


def accuracy(evaluate: Evaluate, model: nn.Module) -> float:
    """The result of the evaluation, -inf for NaN: a failed trial and not an error."""

    def comparable() -> float:
        value = evaluate(model)
        return -math.inf if value != value else value

    return number(comparable, "evaluate")
