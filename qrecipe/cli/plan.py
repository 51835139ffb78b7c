"""``qrecipe plan`` and ``qrecipe explain``."""

from __future__ import annotations

from collections.abc import Sequence

from qrecipe.cli.model_argument import load_subject, required_inputs
from qrecipe.cli.user_code import user_code, user_output
from qrecipe.model.call import Inputs
from qrecipe.planning.decide import decide
from qrecipe.planning.plan import Plan
from qrecipe.recipe.recipe import load_recipe


def make_plan(
    recipe: str, model: str, shapes: Sequence[str] | None, plugins: Sequence[str] | None
) -> Plan:
    """The plan of a recipe for the model of a factory, named as on the command line."""
    with user_code(plugins) as code, user_output():
        loaded = load_recipe(recipe)
        subject = load_subject(code, model, shapes)
        inputs = Inputs.from_batch(required_inputs(subject, model))
        return decide(subject.model, loaded, inputs)
