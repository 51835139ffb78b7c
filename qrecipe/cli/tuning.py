"""``qrecipe suggest`` and ``qrecipe tune``: recipes that the tool writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qrecipe.authoring.suggest import suggestion
from qrecipe.cli import output
from qrecipe.cli.subjects import load_subject, required_inputs
from qrecipe.cli.usercode import UserCode, user_output
from qrecipe.recipe import parse_recipe
from qrecipe.writing import write_atomically


def suggest(
    model: str, shapes: Sequence[str], plugins: Sequence[str], out: str | None, *, as_json: bool
) -> None:
    """Print or write a recipe for the model of a factory, named as on the command line."""
    with UserCode() as code, user_output():
        code.import_plugins(plugins)
        subject = load_subject(code, model, shapes)
        text = suggestion(subject.model, required_inputs(subject, model))
    if out is not None:
        write_atomically(Path(out), text)
    if as_json:
        recipe = parse_recipe(text)
        output.out_json({"recipe": text, "fingerprint": recipe.fingerprint, "out": out})
    elif out is None:
        output.out(text.rstrip("\n"))
    else:
        output.out(f"written to {out}")
