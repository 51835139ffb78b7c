"""Where a quantized model can be exported to, and what it is exported from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from torch import nn

from qrecipe.artifact.container import path_of, write_copy
from qrecipe.artifact.export.aoti import write_aoti
from qrecipe.artifact.export.judged import Opener, Written, check_reopened
from qrecipe.artifact.export.lowering import Lowering
from qrecipe.artifact.export.onnx import check_onnx, write_onnx
from qrecipe.artifact.export.openvino import files_of, write_openvino
from qrecipe.artifact.export.program import Sizes
from qrecipe.artifact.export.pt2 import write_pt2
from qrecipe.artifact.export.pte import write_pte
from qrecipe.artifact.export.stored import Stored
from qrecipe.artifact.rebuilding import Constants
from qrecipe.errors.findings import ArtifactError
from qrecipe.errors.spelling import did_you_mean
from qrecipe.errors.text import shown
from qrecipe.execution.part import Exportable
from qrecipe.execution.provenance import Provenance
from qrecipe.model.call import Inputs
from qrecipe.pipeline import CompiledRecipe, exportable, origin_of
from qrecipe.process.neutral import neutral
from qrecipe.recipe.overlay import for_executorch
from qrecipe.recipe.recipe import Recipe
from qrecipe.recipe.schema import Executor
from qrecipe.rules.resolution import listed
from qrecipe.runtimes import executorch
from qrecipe.runtimes.inductor import check_compiler
from qrecipe.runtimes.table import RUNTIMES

Name = Literal["onnx", "openvino", "pt2", "pte", "aoti"]


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A prepared model that has seen its batches, and the call that it was compiled for."""

    compiled: CompiledRecipe
    prepared: nn.Module

    @property
    def inputs(self) -> Inputs:
        return self.compiled.example_inputs

    def origin(self) -> Provenance:
        return origin_of(self.compiled)

    def converted(self) -> nn.Module:
        return self.compiled.convert(self.prepared)

    def exportable(self) -> Exportable:
        return exportable(self.compiled, self.prepared)


Source = Calibrated | Stored
"""A quantized model; what it gives is audited."""


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of file: ``executor`` carries out plans for it if the recipe names none.

    ``check`` raises ``QRecipeError`` (QR602) if something is not installed, before anything runs.
    ``opener`` opens the file in another process. ``files`` are those that are written, the named
    one first; it raises ``ArtifactError`` (QR502) for a name that the runtime does not take.
    ``fitted`` gives a recipe for other kernels as the target takes it.
    """

    check: Callable[[], None]
    write: Callable[[Source, Path, Sizes], Written]
    opener: Opener
    executor: Executor | None = None
    files: Callable[[Path], tuple[Path, ...]] = lambda path: (path,)
    fitted: Callable[[Recipe], Recipe] = lambda recipe: recipe


def export(source: Source, to: Name, path: Path, sizes: Sizes = "batch") -> Lowering | None:
    """Write a file, open it in a fresh process and compare it, and move it into place.

    Raises what the function of the target raises, and what `check_reopened` does.
    """
    target = TARGETS[to]
    files = target.files(path)
    with TemporaryDirectory() as folder:
        made = Path(folder) / path.name
        written = target.write(source, made, sizes)
        check_reopened(target.opener, made, written.run)
        for file in reversed(files):  # the named one needs the others
            write_copy(made.with_name(file.name), file)
    return written.lowering


@neutral
def export_stored(
    stored: str | os.PathLike[str],
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    to: Name,
    any_batch: bool = True,
    constants: Constants | None = None,
) -> None:
    """Export a model that `save_quantized` stored, as ``qrecipe export`` does; it needs no data.

    ``stored``, ``model`` and ``constants`` are as for `load_quantized`, ``example_inputs`` as for
    `qrecipe.plan`. ``to`` is ``"onnx"``, ``"openvino"``, ``"pt2"``, ``"pte"`` or ``"aoti"``. Files
    take batches of any size, those of ExecuTorch up to that of the example; or, if ``any_batch`` is
    False, that of the example alone. The file is opened in a fresh process and compared with the
    model before it is moved to ``path``.

    Raises:
        ArtifactError: as `load_quantized`; or the model cannot be exported (QR512), or the file
            cannot be written (QR502).
        AuditError: the file computes something else (QR414), or cannot be run (QR413); or what
            `lower` raises.
        PlanError: the model does not accept the inputs (QR307).
        QRecipeError: something that the target needs is not installed (QR602).
    """
    if to not in TARGETS:
        hint = did_you_mean(to, TARGETS) or f"targets are {listed(list(TARGETS), 5)}"
        raise ArtifactError.of("QR512", f"{shown(to)} is not an export target", hint=hint)
    TARGETS[to].check()
    source = Stored.load(stored, model, Inputs.from_batch(example_inputs), constants)
    export(source, to, path_of(path, "export_stored"), "batch" if any_batch else None)


def _from_functions(write: Callable[..., Written]) -> Callable[[Source, Path, Sizes], Written]:
    return lambda source, path, sizes: write(source.exportable(), source.origin(), path, sizes)


def _from_program(write: Callable[..., Written]) -> Callable[[Source, Path, Sizes], Written]:
    return lambda source, path, sizes: write(source.converted(), path, source.inputs.batch, sizes)


TARGETS: Mapping[Name, Target] = {
    "onnx": Target(check_onnx, _from_functions(write_onnx), "onnxruntime"),
    "openvino": Target(
        RUNTIMES["openvino"].check, _from_functions(write_openvino), "openvino", files=files_of
    ),
    "pt2": Target(lambda: None, _from_program(write_pt2), "torch.export", "pt2e"),
    "pte": Target(
        *(executorch.check_installed, _from_program(write_pte), "executorch", "pt2e"),
        fitted=for_executorch,
    ),
    "aoti": Target(check_compiler, _from_program(write_aoti), "AOTInductor", "pt2e"),
}
