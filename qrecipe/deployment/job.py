"""What every runtime is given: a model, one call of it, and the plans of its recipe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qrecipe._torch_ao import quiet
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import ExecutionError
from qrecipe.execution.batches import Forward, inputs_of_batch, peek, rereadable
from qrecipe.execution.calibration import calibrate
from qrecipe.model.call import Inputs, batch_size
from qrecipe.model.copies import runnable_copy
from qrecipe.pipeline import CompiledRecipe, compile_decided
from qrecipe.planning.asked import executed_by
from qrecipe.planning.decide import warn_of_missed
from qrecipe.process.warnings import unwarned
from qrecipe.recipe.recipe import Recipe
from qrecipe.recipe.schema import Executor
from qrecipe.runtimes.served import Served, canonical
from qrecipe.runtimes.session import ModuleSession, Session
from qrecipe.transforms.transform import ready

_JUDGED = 32
"""So many samples of the first batch are compared at most."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A recipe that is planned and calibrated, and what its reference gives for `Job.judged`.

    ``sqnr_db`` is that of the reference against float.
    """

    compiled: CompiledRecipe
    prepared: nn.Module
    output: Any
    sqnr_db: float | None


@dataclass(frozen=True, slots=True)
class Job:
    """A copy of the caller's model, and what is done with it.

    ``planned_model`` is what is quantized: the model as the recipe transforms it. ``timed`` is the
    call to measure. ``judged`` is the call whose outputs are compared; sessions compute it in steps
    of the size of ``timed``. ``template`` is the float output of the former, ``output`` that of the
    latter.
    """

    model: nn.Module
    planned_model: nn.Module
    recipe: Recipe
    batches: Iterable[Any]
    forward: Forward | None
    timed: Inputs
    judged: Inputs
    template: Any
    output: Any
    folder: Path
    _plans: dict[Executor | str | None, Planned] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        recipe: Recipe,
        batches: Iterable[Any],
        forward: Forward | None,
        batch_size: int | None,
        folder: Path,
    ) -> Job:
        """Raises ``ExecutionError`` (QR425) for a batch size where the inputs are no batch."""
        held = rereadable(batches, recipe.calibration.max_batches)
        first, _ = peek(held)
        with inputs_of_batch(model, first, forward) as inputs:
            given = canonical(model, inputs)
        timed = given if batch_size is None else _of_size(given, batch_size)
        judged = given.first_samples(_JUDGED)
        eager = runnable_copy(model)
        with torch.no_grad(), quiet():
            template = timed.cloned().call(eager)
            # as the others are run, should samples of a batch depend on each other
            steps = Served(ModuleSession(eager), eager, template, _step(timed, template))
            output = judged.cloned().call(steps)
        changed = ready(model, recipe, held, forward)
        return cls(eager, changed, recipe, held, forward, timed, judged, template, output, folder)

    def served(self, session: Session) -> Served:
        """A session as a model that takes any size of batch."""
        return Served(session, self.model, self.template, _step(self.timed, self.template))

    def planned(self, recipe: Recipe) -> Planned:
        """The plan of a recipe, made once for each executor and backend.

        8-bit activations are not refused: whether a kernel saturates is seen by what it computes.
        Raises what `qrecipe.quantize` raises.
        """
        key = f"{recipe.executor} {recipe.backend}"
        if key not in self._plans:
            self._plans[key] = self._made(recipe)
        return self._plans[key]

    def _made(self, recipe: Recipe) -> Planned:
        compiled = compile_decided(self.planned_model, recipe, self.timed, "vnni")
        if not self._plans:  # the others are of the same recipe
            warn_of_missed(compiled.plan, recipe)
        prepared = compiled._prepared()
        with unwarned(), quiet():
            calibrate(prepared, self.batches, forward=self.forward, progress=False)
            reference = compiled._reference(prepared)
            with torch.no_grad():
                output = self.judged.cloned().call(self.served(ModuleSession(reference)))
        return Planned(compiled, prepared, output, output_sqnr_db(self.output, output))

    def executed_by(self, executor: Executor) -> Planned:
        """The plan of the recipe for this executor."""
        return self.planned(executed_by(self.recipe, executor))


def _step(timed: Inputs, template: Any) -> int | None:
    """The size of batch that every session takes; None if the model has no batches."""
    size = timed.batch_size
    return size if size is not None and batch_size(template) == size else None


def _of_size(inputs: Inputs, size: int) -> Inputs:
    """So many samples of a batch, repeated if it has fewer."""
    count = inputs.batch_size
    if not count:
        text = f"{size} samples are asked for, but the model's inputs are not a batch"
        hint = "leave the size of the batch out: inputs are measured as they are"
        raise ExecutionError.of("QR425", text, hint=hint)
    return inputs.taken(torch.arange(size) % count)
