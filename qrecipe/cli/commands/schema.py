"""``qrecipe schema``: the recipe format for editors."""

from __future__ import annotations

from qrecipe.cli.options import PluginOption
from qrecipe.cli.output import out_json, reported


def schema(plugin: PluginOption = None) -> None:
    """Print the recipe format as JSON Schema.

    It includes the names and arguments of all known observers and fake-quants.

    \b
    Examples:
      qrecipe schema > recipe.schema.json
      qrecipe schema --plugin acme.observers > recipe.schema.json
    """
    with reported(as_json=False):
        from qrecipe.cli.user_code import UserCode, user_output
        from qrecipe.recipe.json_schema import recipe_schema

        with UserCode() as code, user_output():
            code.import_plugins(plugin or ())
            found = recipe_schema()
        out_json(found)
