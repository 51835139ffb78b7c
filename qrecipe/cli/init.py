"""``qrecipe init``: a recipe and the functions that it needs, to be filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qrecipe.cli import options
from qrecipe.cli.output import check_free, out, out_json
from qrecipe.files import write_atomically
from qrecipe.recipe.toml.writer import toml_value

_TEMPLATES = Path(__file__).with_name("templates")
_NAME = "own"
"""Of the templates, which name each other."""


def init(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="The files are NAME.toml and NAME.py."),
    ] = _NAME,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Write a recipe with comments and a file with the functions that the commands need.

    Both work as they are. Put your own model, data and evaluation into the functions.

    \b
    Examples:
      qrecipe init
      qrecipe init quantization/resnet
    """
    stem = name.removesuffix(".toml").removesuffix(".py")
    recipe, functions = Path(f"{stem}.toml"), Path(f"{stem}.py")
    for path in (recipe, functions):
        check_free({"NAME": str(path)}, force=force)
    for path in (recipe, functions):
        text = (_TEMPLATES / f"{_NAME}{path.suffix}").read_text(encoding="utf-8")
        text = text.replace(f"{_NAME}.py", functions.name)
        named = f"name = {toml_value(recipe.stem)}"
        write_atomically(path, text.replace(f'name = "{_NAME}"', named))
    if json:
        out_json({"recipe": str(recipe), "functions": str(functions)})
    else:
        out(_next_steps(recipe, functions))


def _next_steps(recipe: Path, functions: Path) -> str:
    named = f"--model {functions}:factory"
    return (
        f"written to {recipe} and {functions}; then:\n"
        f"  qrecipe plan {recipe} {named}\n"
        f"  qrecipe quantize {recipe} {named} --data {functions}:calibration \\\n"
        f"      --evaluate {functions}:evaluate --out {recipe.with_suffix('.safetensors')}\n"
        f"  qrecipe suggest {named} --out {recipe} --force  # a recipe for this very model"
    )
