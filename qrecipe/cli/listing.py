"""``qrecipe list`` and ``qrecipe schema``: what recipes can use here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, get_args

import qrecipe
from qrecipe.cli import options
from qrecipe.cli.output import out, out_json
from qrecipe.cli.user_code import user_code, user_output
from qrecipe.errors.findings import RecipeError
from qrecipe.recipe.references import ENTRY_POINT_GROUP, Publisher, builtin_names, titled
from qrecipe.registry import table as registered
from qrecipe.registry.arguments import Kind
from qrecipe.registry.builtin import BUILTIN, known_names, signature
from qrecipe.registry.entry_points import claims, entry_points, every_claim, misnamed
from qrecipe.terminal.tables import render_table


def list_names(plugin: options.Plugin = None, json: options.Json = False) -> None:
    """List recipes, observers, fake-quants, transforms and backends.

    Imports all installed plugins to show their arguments, or what is wrong with them.

    \b
    Examples:
      qrecipe list
      qrecipe list --plugin acme.observers --json
    """
    with user_code(plugin), user_output():
        listing = {
            "recipes": list(_recipes()),
            "observers": list(_constructors("observer")),
            "fake_quants": list(_constructors("fake_quant")),
            "transforms": list(_constructors("transform")),
            "backends": list(_backends()),
            "ignored_plugins": list(_ignored()),
        }
    if json:
        out_json(listing)
    else:
        _show(listing)


def schema(plugin: options.Plugin = None) -> None:
    """Print the recipe format as JSON Schema.

    It includes the names and arguments of all known observers, fake-quants and transforms.

    \b
    Examples:
      qrecipe schema > recipe.schema.json
      qrecipe schema --plugin acme.observers > recipe.schema.json
    """
    with user_code(plugin):
        from qrecipe.recipe.json_schema import recipe_schema

        out_json(recipe_schema())


_OWNER: dict[Kind, str] = {"transform": "qrecipe"}
"""Whose a name is that is built in, if not torch's."""

_Line = dict[str, Any]
"""A row of the listing, with the keys of the JSON document."""


def _show(listing: Mapping[str, Sequence[_Line]]) -> None:
    """Five tables; then entry points without effect and broken plugins, if any."""
    rows = [
        (_title(each), each["backend"] or "", each["description"]) for each in listing["recipes"]
    ]
    out(render_table(("recipe", "backend", "description"), rows))
    kinds = {"observer": "observers", "fake-quant": "fake_quants", "transform": "transforms"}
    for title, key in kinds.items():
        rows = [(each["name"], each["origin"], _arguments(each)) for each in listing[key]]
        out("\n" + render_table((title, "from", "arguments"), rows))
    runs = {True: "yes", False: "no", None: "unknown"}
    rows = [(each["name"], runs[each["available"]], each["note"]) for each in listing["backends"]]
    out("\n" + render_table(("backend", "runs here", ""), rows))
    if listing["ignored_plugins"]:
        rows = [tuple(each.values()) for each in listing["ignored_plugins"]]
        out("\n" + render_table(("entry point without effect", "from", "why"), rows))
    for each in chain.from_iterable(map(listing.__getitem__, kinds.values())):
        if each["problem"] is not None:
            out(f"\n{each['problem']}")


def _title(recipe: _Line) -> str:
    name, version = recipe["distribution"], recipe["version"]
    return titled(recipe["reference"], Publisher(name, version) if name and version else None)


def _arguments(constructor: _Line) -> str:
    usable = constructor["problem"] is None
    return ", ".join(constructor["arguments"]) if usable else "cannot be used, see below"


def _recipes() -> Iterator[_Line]:
    for name in builtin_names():
        yield _recipe(f"builtin:{name}", None, None)
    for point in entry_points(ENTRY_POINT_GROUP):
        yield _recipe(f"{point.distribution}:{point.name}", point.distribution, point.version)


def _recipe(reference: str, distribution: str | None, version: str | None) -> _Line:
    backend = None
    try:
        recipe = qrecipe.load_recipe(reference)
    except RecipeError as error:
        description = f"cannot be used: {error.findings[0].message}"
    else:
        backend = recipe.backend
        description = " ".join((recipe.description or "").split()).partition(". ")[0].rstrip(".")
    return {
        "reference": reference,
        "distribution": distribution,
        "version": version,
        "backend": backend,
        "description": description,
    }


def _constructors(kind: Kind) -> Iterator[_Line]:
    """Where each comes from, its class and arguments; what cannot be used has no class."""
    for name in known_names(kind):
        problem = None if name in BUILTIN[kind] else _problem(kind, name)
        found = signature(kind, name) if problem is None else None
        yield {
            "name": name,
            "origin": _origin(kind, name),
            "arguments": [] if found is None else list(found.parameters),
            "target": None if found is None else found.target,
            "problem": problem,
        }


def _origin(kind: Kind, name: str) -> str:
    if name in BUILTIN[kind]:
        return _OWNER.get(kind, "torch")
    if claimed := claims(kind, name):
        return ", ".join(map(str, claimed))
    registration = registered.find(kind, name)
    return "?" if registration is None else registration.module


def _problem(kind: Kind, name: str) -> str | None:
    """Why a plugin cannot be used, found out by importing it."""
    if importlib.util.find_spec("torch") is None:
        return f"{name} of {_origin(kind, name)} cannot be loaded without torch"
    from qrecipe.observers.loading import load

    return "\n".join(map(str, load(kind, name))) or None


def _ignored() -> Iterator[_Line]:
    """The entry points of plugins that have no effect."""
    for point in misnamed():
        yield {
            "entry_point": point.name,
            "origin": f"{point.distribution} {point.version}",
            "problem": 'it is not named "observer.NAME", "fake_quant.NAME" or "transform.NAME" '
            "with a plain name",
        }
    for claim in every_claim():
        if claim.name in BUILTIN[claim.kind]:
            yield {
                "entry_point": f"{claim.kind}.{claim.name}",
                "origin": str(claim),
                "problem": f"the name belongs to {_OWNER.get(claim.kind, 'torch')}",
            }


def _backends() -> Iterator[_Line]:
    from qrecipe.recipe.schema import Backend

    for name in get_args(Backend):
        available, note = _availability(name)
        yield {"name": name, "available": available, "note": note}


def _availability(backend: str) -> tuple[bool | None, str]:
    """Whether a backend runs here, None if that is not known, and why not."""
    if importlib.util.find_spec("torch") is None:
        return None, "torch is not installed"
    import torch

    from qrecipe.execution.engine import ENGINES, available_engines

    if backend not in ENGINES:
        return False, "for export only: torch has no kernels for it"
    if backend not in available_engines():
        return False, f"torch {torch.__version__} lacks its engine here"
    return True, ""
