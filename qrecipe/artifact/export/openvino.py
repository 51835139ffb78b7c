"""A prepared model -> OpenVINO's own format, by way of ONNX."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from qrecipe.artifact.carried import KEY
from qrecipe.artifact.container import path_of, write_copy
from qrecipe.artifact.export.judged import Written
from qrecipe.artifact.export.onnx import ANY_BATCH, checked_content
from qrecipe.artifact.saving import text_of
from qrecipe.errors.findings import ArtifactError
from qrecipe.errors.text import shown
from qrecipe.execution.part import Exportable
from qrecipe.execution.provenance import Provenance
from qrecipe.pipeline import CompiledRecipe, exportable, origin_of
from qrecipe.process.memory import failing_as
from qrecipe.process.neutral import neutral
from qrecipe.runtimes.table import RUNTIMES


@neutral
def export_openvino(
    compiled: CompiledRecipe,
    prepared: nn.Module,
    path: str | os.PathLike[str],
    *,
    dynamic_shapes: Any = ANY_BATCH,
) -> None:
    """Export a calibrated or trained model to OpenVINO: ``model.xml``, and ``model.bin`` beside it.

    As `export_onnx`, from whose file it is made, and compared as that is. Floats stay float32.

    Raises what `export_onnx` raises, and ``ArtifactError`` (QR502) for a path that does not end
    with ``.xml``.
    """
    RUNTIMES["openvino"].check()
    files_of(path)
    found, ignore = exportable(compiled, prepared), compiled.recipe.lint.ignore
    write_openvino(found, origin_of(compiled), path, dynamic_shapes, ignore)


def write_openvino(
    found: Exportable,
    origin: Provenance,
    path: str | os.PathLike[str],
    dynamic_shapes: Any = ANY_BATCH,
    ignore: Sequence[str] = (),
) -> Written:
    """As `export_openvino`."""
    files = files_of(path)
    content, run = checked_content(found, origin, dynamic_shapes, ignore)
    openvino: Any = import_module("openvino")
    with TemporaryDirectory() as folder:
        made = Path(folder) / "model.xml"
        with failing_as(ArtifactError, "QR512", "OpenVINO cannot take the model"):
            model = openvino.Core().read_model(content, b"")
            model.set_rt_info(text_of(origin), KEY)
            openvino.save_model(model, str(made), compress_to_fp16=False)
        for file in reversed(files):  # the graph needs its weights
            write_copy(made.with_suffix(file.suffix), file)
    return Written(run)


def files_of(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The file of the graph, and that of its weights."""
    file = path_of(path, "export_openvino")
    if file.suffix != ".xml":
        hint = f"the weights are written beside it: {shown(file.with_suffix('.bin').name)}"
        message = f"{shown(str(file))}: a file of OpenVINO ends with .xml"
        raise ArtifactError.of("QR502", message, hint=hint)
    return file, file.with_suffix(".bin")
