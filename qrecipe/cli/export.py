"""``qrecipe export``: a quantized model as a file for another runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

import qrecipe
from qrecipe.cli import options
from qrecipe.cli.output import check_outputs, files_of, out, out_json, show_plan
from qrecipe.cli.user_code import user_code, user_output
from qrecipe.terminal.progress import activity

if TYPE_CHECKING:
    from qrecipe.artifact.export.lowering import Lowering

Target = Literal["onnx", "openvino", "pt2", "pte", "aoti"]


def export(
    source: Annotated[
        str, options.argument("RECIPE|FILE", "A recipe, or a file from save_quantized.")
    ],
    to: Annotated[
        Target,
        options.one_of(
            "--to",
            get_args(Target),
            "ONNX, OpenVINO, torch.export, ExecuTorch, or a package that torch's compiler made.",
        ),
    ],
    output: Annotated[str, typer.Option("--out", metavar="FILE", show_default=False)],
    model: options.Model,
    data: options.Batches = None,
    input: options.Input = None,
    constants: options.Constants = "{}",
    target_cpu: options.TargetCpu = "this",
    executor: options.Executor = None,
    fixed_batch: Annotated[
        bool,
        typer.Option(
            "--fixed-batch",
            help="The file only takes batches of the example's size.",
        ),
    ] = False,
    force: options.Force = False,
    threads: options.Threads = None,
    strict: options.Strict = False,
    plugin: options.Plugin = None,
    json: options.Json = False,
) -> None:
    """Quantize a model, or load a stored one, and export it.

    The file is opened in a fresh process and compared with the quantized model before it is moved
    into place.

    \b
    Examples:
      qrecipe export cnn.toml --model model.py:factory --data model.py:batches \\
          --to onnx --out model.onnx
      qrecipe export model.safetensors --model model.py:factory --to openvino --out model.xml
    """
    is_stored = _is_stored(Path(source))
    if is_stored:
        own = {"--executor": executor is not None, "--target-cpu": target_cpu != "this"}
        _refuse(own, "a stored model keeps what it was quantized for")
    else:
        _refuse({"--constants": constants != "{}"}, "a recipe takes those of the example inputs")
    from qrecipe.artifact.export import targets
    from qrecipe.artifact.export.program import Sizes
    from qrecipe.artifact.export.stored import Stored
    from qrecipe.cli.model_argument import (
        compiled_for,
        prepared_on,
        set_threads,
        subject_and_batches,
    )
    from qrecipe.model.call import Inputs
    from qrecipe.planning.asked import executed_by

    target = targets.TARGETS[to]
    target.check()
    for file in target.files(Path(output))[1:]:
        check_outputs({"--out": str(file)}, force=force)
    set_threads(threads)
    with user_code(plugin) as code:
        check_outputs({"--out": output}, [source] if is_stored else files_of(source), force=force)
        made: targets.Source
        if is_stored:
            with user_output():
                subject, first, _ = subject_and_batches(code, model, data, input)
                inputs, own = Inputs.from_batch(first), options.table(constants)
                made = Stored.load(source, subject.model, inputs, own)
        else:
            with user_output():
                recipe = target.fitted(qrecipe.load_recipe(source))
                asked = executor or recipe.executor or target.executor
                chosen = executed_by(recipe, asked)
                subject, first, batches = subject_and_batches(code, model, data, input, chosen)
                compiled = compiled_for(subject, chosen, first, target_cpu)
            show_plan(compiled.plan, as_json=json, strict=strict)
            with user_output():
                made = targets.Calibrated(compiled, prepared_on(compiled, batches))
        with user_output(), activity("exporting"):
            sizes: Sizes = None if fixed_batch else "batch"
            lowering = targets.export(made, to, Path(output), sizes)
    _show(output, to, lowering, as_json=json)


def _refuse(given: Mapping[str, bool], why: str) -> None:
    """Raises BadParameter for an option that would do nothing."""
    for option, is_given in given.items():
        if is_given:
            raise typer.BadParameter(why, param_hint=option)


def _is_stored(path: Path) -> bool:
    """Whether a file starts as safetensors do, and not as a text."""
    try:
        with path.open("rb") as stream:
            return b"\0" in stream.read(8)
    except (OSError, ValueError):
        return False


def _show(output: str, to: str, lowering: Lowering | None, *, as_json: bool) -> None:
    nbytes = os.path.getsize(output)
    if as_json:
        kernels = None if lowering is None else lowering.to_json()
        out_json({"file": output, "to": to, "bytes": nbytes, "lowering": kernels})
        return
    if lowering is not None:
        out(str(lowering))
    out(f"written to {output}: {nbytes:,} bytes")
