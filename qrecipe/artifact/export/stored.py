"""Stored models for other runtimes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qrecipe.artifact.container import opened
from qrecipe.artifact.loading import load_quantized
from qrecipe.artifact.metadata import stored_model
from qrecipe.artifact.rebuilding import Constants, recorded_with
from qrecipe.errors.findings import QRecipeError
from qrecipe.execution.engine import engine_of
from qrecipe.execution.executors import executor_of
from qrecipe.execution.joined import joined
from qrecipe.execution.part import Exportable, Recorded
from qrecipe.execution.provenance import Provenance, converted_graphs, provenance, stored_plan
from qrecipe.model.call import Inputs
from qrecipe.model.dry_run import unusable
from qrecipe.model.roots import inputs_of_roots
from qrecipe.process.warnings import held_back


@dataclass(frozen=True, slots=True)
class Stored:
    """A model from a file, one call of it, and what it was loaded into, with its plan."""

    model: nn.Module
    inputs: Inputs
    recorded: Recorded

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        inputs: Inputs,
        constants: Constants | None = None,
    ) -> Stored:
        """Arguments and errors as for `load_quantized`.

        Also raises ``PlanError`` (QR307) if the model does not accept the inputs.
        """
        loaded = load_quantized(path, model, constants=constants)
        _check_taken(loaded, inputs)
        with opened(Path(path)) as file:
            recorded = recorded_with(model, stored_model(file), constants or {})
        return cls(loaded, inputs, recorded)

    def origin(self) -> Provenance:
        return provenance(self.model)

    def converted(self) -> nn.Module:
        return self.model

    def exportable(self) -> Exportable:
        parts = converted_graphs(self.model)
        roots = list(filter(None, parts))
        inputs = inputs_of_roots(self.model, self.inputs, roots) if roots else {"": self.inputs}
        executor = executor_of(self.recorded.plan.executor)
        with held_back([("", Warning)]):  # about observers that saw nothing
            found = executor.exportable_parts(self.recorded, parts, inputs)
        return found[""] if "" in found else joined(self.model, found, self.inputs, None)


def _check_taken(model: nn.Module, inputs: Inputs) -> None:
    try:
        with torch.no_grad(), engine_of(stored_plan(provenance(model))):
            inputs.cloned().call(model)
    except QRecipeError:
        raise
    except Exception as error:
        raise unusable(error) from error
