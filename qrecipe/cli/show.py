"""``qrecipe show``: a resolved recipe, and where each value was set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import tomli

import qrecipe
from qrecipe.cli import options
from qrecipe.cli.output import out, out_json
from qrecipe.cli.user_code import user_code
from qrecipe.errors.findings import Location, UnknownNameError
from qrecipe.recipe.toml.positions import KeyPath, Spans

if TYPE_CHECKING:
    from qrecipe.recipe.recipe import Recipe

_WIDEST_CODE = 60


def show(recipe: options.Recipe, plugin: options.Plugin = None, json: options.Json = False) -> None:
    """Show the resolved recipe, and where each value was set.

    \b
    Examples:
      qrecipe show cnn.toml
      qrecipe show builtin:x86-static --json
    """
    with user_code(plugin):
        (_show_json if json else _show_text)(qrecipe.load_recipe(recipe))


def _show_text(recipe: Recipe) -> None:
    """The resolved TOML, with the origin of each value in a comment."""
    lines = recipe.to_toml().rstrip("\n").split("\n")
    origins = _origin_by_line(recipe)
    width = max(
        (len(lines[line]) for line in origins if len(lines[line]) <= _WIDEST_CODE), default=0
    )
    itself, *bases = recipe.ingredients
    out(f"# {itself.title}, fingerprint {itself.fingerprint}")
    for base in bases:
        out(f"# extends {base.title}, fingerprint {base.fingerprint}")
    out("")
    for number, text in enumerate(lines):
        at = origins.get(number)
        out(text if at is None else f"{text.ljust(width)}  # {at.file}:{at.line}")


def _show_json(recipe: Recipe) -> None:
    """The values, and their origins by dotted key."""
    from qrecipe.recipe.validation import dotted

    values = tomli.loads(recipe.to_toml())
    out_json(
        {
            "recipe": recipe.reference,
            "fingerprint": recipe.fingerprint,
            "ingredients": [each.to_json() for each in recipe.ingredients],
            "values": values,
            "origins": {
                dotted(path): {"file": at.file, "line": at.line, "column": at.column}
                for path, at in _origins(recipe, values)
            },
        }
    )


def _origin_by_line(recipe: Recipe) -> dict[int, Location]:
    """The origin of the value that ends on each line, by line number from 0."""
    text = recipe.to_toml()
    spans = Spans(text, "resolved")
    found: dict[int, Location] = {}
    for path, at in _origins(recipe, tomli.loads(text)):
        _, end = spans.value_offsets(path)
        found.setdefault(text.count("\n", 0, end), at)
    return found


def _origins(recipe: Recipe, values: Mapping[str, Any]) -> Iterator[tuple[KeyPath, Location]]:
    """Each value that a file sets as a whole, with its location."""
    from qrecipe.recipe.validation import dotted

    for path in _paths(values, ()):
        with suppress(UnknownNameError):
            yield path, recipe.origin(dotted(path))


def _paths(table: Mapping[str, Any], above: KeyPath) -> Iterator[KeyPath]:
    for key, value in table.items():
        path = (*above, key)
        yield path
        if isinstance(value, Mapping):
            yield from _paths(value, path)
