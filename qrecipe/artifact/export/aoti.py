"""A converted program -> a package of AOTInductor, compiled for this kind of CPU."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from qrecipe.artifact.carried import add_to_archive
from qrecipe.artifact.container import path_of, write
from qrecipe.artifact.export.inductor import audited, for_compiler
from qrecipe.artifact.export.judged import Run, Written
from qrecipe.artifact.export.program import Program, Sizes, for_sizes
from qrecipe.artifact.saving import text_of
from qrecipe.model.call import Inputs
from qrecipe.process.neutral import neutral
from qrecipe.runtimes.inductor import check_compiler, frozen


@neutral
def export_aoti(
    converted: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    dynamic_shapes: Sizes = "batch",
) -> None:
    """Compile a model that PT2E converted ahead of time, into a package of AOTInductor.

    ``torch._inductor.aoti_load_package`` loads it, without torchao and qrecipe, if its name ends
    with ``.pt2``; it runs on CPUs with the instructions of this one. ``example_inputs`` are as for
    `qrecipe.plan`; the first dimension of each input is free in the package, or theirs with
    ``dynamic_shapes=None``, as other sizes are. The package is loaded and compared with the model
    before it is written. Needs a C++ compiler; for some models it takes minutes.

    Raises what `lower` raises, and ``ArtifactError`` (QR502) if the file cannot be written.
    """
    write_aoti(converted, path_of(path, "export_aoti"), example_inputs, dynamic_shapes)


def write_aoti(converted: nn.Module, file: Path, example_inputs: Any, sizes: Sizes) -> Written:
    """As `export_aoti`."""
    check_compiler()
    inputs = for_sizes(Inputs.from_batch(example_inputs), sizes)
    program, exported = Program.of(converted, inputs), for_compiler(converted, inputs, sizes)
    with TemporaryDirectory() as folder:
        made, found = Path(folder) / "model.pt2", list[Any]()

        def compile_and_run() -> Any:
            with frozen():
                torch._inductor.aoti_compile_and_package(exported, package_path=str(made))
                loaded = torch._inductor.aoti_load_package(str(made))
                given = program.inputs.cloned()
                found.append(loaded(*given.args, **given.kwargs))
                return found[0]

        lowering = audited(program, compile_and_run)
        add_to_archive(made, text_of(program.origin))
        write(file, lambda stream: stream.write(made.read_bytes()))
    return Written(Run(program.inputs, found[0], None), lowering)
