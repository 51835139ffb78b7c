"""Where a quantized model can be exported to, and what it is exported from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch import nn

from qrecipe.artifact.export.aoti import write_aoti
from qrecipe.artifact.export.lowering import Lowering
from qrecipe.artifact.export.onnx import check_onnx, write_onnx
from qrecipe.artifact.export.program import Program
from qrecipe.artifact.export.pt2 import export_pt2
from qrecipe.artifact.export.pte import write_pte
from qrecipe.execution.part import Exportable
from qrecipe.model.call import Inputs
from qrecipe.pipeline import CompiledRecipe, exportable
from qrecipe.recipe.schema import Executor
from qrecipe.runtimes import executorch
from qrecipe.runtimes.inductor import check_compiler

Name = Literal["onnx", "pt2", "pte", "aoti"]


class Source(Protocol):
    """A quantized model, and one call of it."""

    @property
    def inputs(self) -> Inputs: ...

    def converted(self) -> nn.Module:
        """The model that is executed, audited."""

    def exportable(self) -> Exportable:
        """The model as plain functions, audited.

        Raises ``ArtifactError`` (QR512) if it cannot be exported.
        """


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A prepared model that has seen its batches."""

    compiled: CompiledRecipe
    prepared: nn.Module

    @property
    def inputs(self) -> Inputs:
        return self.compiled.example_inputs

    def converted(self) -> nn.Module:
        return self.compiled.convert(self.prepared)

    def exportable(self) -> Exportable:
        return exportable(self.compiled, self.prepared)


@dataclass(frozen=True, slots=True)
class Stored:
    """A model that was loaded from a file."""

    model: nn.Module
    inputs: Inputs

    def converted(self) -> nn.Module:
        return self.model

    def exportable(self) -> Exportable:
        return Program.of(self.model, self.inputs).exportable()


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of file: ``executor`` carries out plans for it if the recipe names none.

    ``check`` raises ``QRecipeError`` (QR602) if something is not installed, before anything runs.
    """

    check: Callable[[], None]
    write: Callable[[Source, Path], Lowering | None]
    executor: Executor | None = None


_Export = Callable[[nn.Module, Path, object], Lowering | None]


def _from_program(export: _Export) -> Callable[[Source, Path], Lowering | None]:
    return lambda source, path: export(source.converted(), path, source.inputs.batch)


TARGETS: Mapping[Name, Target] = {
    "onnx": Target(check_onnx, lambda source, path: write_onnx(source.exportable(), path)),
    "pt2": Target(lambda: None, _from_program(export_pt2), "pt2e"),
    "pte": Target(executorch.check_installed, _from_program(write_pte), "pt2e"),
    "aoti": Target(check_compiler, _from_program(write_aoti), "pt2e"),
}
