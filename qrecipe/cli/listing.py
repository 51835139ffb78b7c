"""``qrecipe list``: what recipes can name here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from typing import get_args

from qrecipe.arguments import Kind
from qrecipe.cli.output import out, out_json
from qrecipe.cli.usercode import UserCode, user_output
from qrecipe.errors import RecipeError
from qrecipe.recipe import load_recipe
from qrecipe.references import ENTRY_POINT_GROUP, builtin_names
from qrecipe.schema import Backend
from qrecipe.signatures import known_names, signature
from qrecipe.tables import render_table


@dataclass(frozen=True, slots=True)
class RecipeLine:
    """A recipe that ``extends`` can name."""

    reference: str
    backend: str | None
    description: str


@dataclass(frozen=True, slots=True)
class ConstructorLine:
    """An observer or fake-quant, with its class and the arguments that it takes."""

    name: str
    origin: str
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BackendLine:
    """A backend; ``available`` is None where that cannot be told without torch."""

    name: str
    available: bool | None
    note: str


@dataclass(frozen=True, slots=True)
class Listing:
    """All that there is."""

    recipes: tuple[RecipeLine, ...]
    observers: tuple[ConstructorLine, ...]
    fake_quants: tuple[ConstructorLine, ...]
    backends: tuple[BackendLine, ...]


def take_listing(plugins: Sequence[str]) -> Listing:
    """Everything, after the user's plugins are imported."""
    with UserCode() as code, user_output():
        code.import_plugins(plugins)
        return Listing(
            recipes=tuple(map(_recipe, _references())),
            observers=tuple(_constructors("observer")),
            fake_quants=tuple(_constructors("fake_quant")),
            backends=tuple(_backends()),
        )


def show_text(listing: Listing) -> None:
    """Four tables."""
    recipes = [(line.reference, line.backend or "", line.description) for line in listing.recipes]
    out(render_table(("recipe", "backend", "description"), recipes))
    for title, lines in (("observer", listing.observers), ("fake-quant", listing.fake_quants)):
        rows = [(line.name, ", ".join(line.arguments), line.origin) for line in lines]
        out("\n" + render_table((title, "arguments", "class"), rows))
    rows = [(line.name, _yes_or_no(line.available), line.note) for line in listing.backends]
    out("\n" + render_table(("backend", "runs here", ""), rows))


def show_json(listing: Listing) -> None:
    """The same as one document."""
    out_json(asdict(listing))


def _references() -> Iterator[str]:
    for name in builtin_names():
        yield f"builtin:{name}"
    published = {
        f"{point.dist.name}:{point.name}"
        for point in entry_points(group=ENTRY_POINT_GROUP)
        if point.dist is not None
    }
    yield from sorted(published)


def _recipe(reference: str) -> RecipeLine:
    try:
        recipe = load_recipe(reference)
    except RecipeError as error:
        return RecipeLine(reference, None, f"cannot be used: {error.findings[0].message}")
    sentence = " ".join((recipe.description or "").split()).partition(". ")[0]
    return RecipeLine(reference, recipe.backend, sentence.rstrip("."))


def _constructors(kind: Kind) -> Iterator[ConstructorLine]:
    for name in known_names(kind):
        found = signature(kind, name)
        if found is not None:
            yield ConstructorLine(name, found.target, tuple(found.parameters))


def _backends() -> Iterator[BackendLine]:
    names: tuple[str, ...] = get_args(Backend)
    if importlib.util.find_spec("torch") is None:
        for name in names:
            yield BackendLine(name, None, "torch is not installed")
        return
    import torch

    from qrecipe.fx.execution import ENGINES

    for name in names:
        if name not in ENGINES:
            yield BackendLine(name, False, "models are prepared for export, torch has no kernels")
        elif name in torch.backends.quantized.supported_engines:
            yield BackendLine(name, True, "")
        else:
            yield BackendLine(name, False, f"torch {torch.__version__} lacks its engine here")


def _yes_or_no(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "unknown"}[value]
