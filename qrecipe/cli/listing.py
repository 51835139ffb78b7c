"""``qrecipe list``: the names that recipes can use here."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import get_args

from qrecipe.cli.output import out, out_json
from qrecipe.cli.user_code import user_code, user_output
from qrecipe.errors.findings import RecipeError
from qrecipe.recipe.recipe import load_recipe
from qrecipe.recipe.references import ENTRY_POINT_GROUP, Publisher, builtin_names, titled
from qrecipe.recipe.schema import Backend
from qrecipe.registry import table as registered
from qrecipe.registry.arguments import Kind
from qrecipe.registry.builtin import FAKE_QUANTS, OBSERVERS, known_names, signature
from qrecipe.registry.entry_points import claims, entry_points, every_claim, misnamed
from qrecipe.terminal.tables import render_table


@dataclass(frozen=True, slots=True)
class RecipeLine:
    """A recipe that ``extends`` can name, and the distribution that publishes it.

    ``distribution`` and ``version`` are None for qrecipe's own recipes.
    """

    reference: str
    distribution: str | None
    version: str | None
    backend: str | None
    description: str

    @property
    def title(self) -> str:
        """The reference, with the distribution and version if there is one."""
        if self.distribution is None or self.version is None:
            return self.reference
        return titled(self.reference, Publisher(self.distribution, self.version))


@dataclass(frozen=True, slots=True)
class ConstructorLine:
    """An observer or fake-quant: where it comes from, its class and its arguments.

    ``origin`` is torch, a distribution with its version, or the module that registered it. If it
    cannot be used, ``target`` is None and ``problem`` says why.
    """

    name: str
    origin: str
    arguments: tuple[str, ...]
    target: str | None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class IgnoredLine:
    """An entry point of a plugin without effect."""

    entry_point: str
    origin: str
    problem: str


@dataclass(frozen=True, slots=True)
class BackendLine:
    """A backend; ``available`` is None if torch is not installed."""

    name: str
    available: bool | None
    note: str


@dataclass(frozen=True, slots=True)
class Listing:
    """Everything that ``qrecipe list`` shows."""

    recipes: tuple[RecipeLine, ...]
    observers: tuple[ConstructorLine, ...]
    fake_quants: tuple[ConstructorLine, ...]
    backends: tuple[BackendLine, ...]
    ignored_plugins: tuple[IgnoredLine, ...]


def take_listing(plugins: Sequence[str] | None) -> Listing:
    """Import the user's and all installed plugins, and list everything."""
    with user_code(plugins), user_output():
        return Listing(
            recipes=tuple(_recipes()),
            observers=tuple(_constructors("observer")),
            fake_quants=tuple(_constructors("fake_quant")),
            backends=tuple(_backends()),
            ignored_plugins=tuple(_ignored()),
        )


def show_text(listing: Listing) -> None:
    """Four tables; then entry points without effect and broken plugins, if any."""
    recipes = [(line.title, line.backend or "", line.description) for line in listing.recipes]
    out(render_table(("recipe", "backend", "description"), recipes))
    for title, lines in (("observer", listing.observers), ("fake-quant", listing.fake_quants)):
        rows = [(line.name, line.origin, _arguments(line)) for line in lines]
        out("\n" + render_table((title, "from", "arguments"), rows))
    rows = [(line.name, _yes_or_no(line.available), line.note) for line in listing.backends]
    out("\n" + render_table(("backend", "runs here", ""), rows))
    if listing.ignored_plugins:
        rows = [(line.entry_point, line.origin, line.problem) for line in listing.ignored_plugins]
        out("\n" + render_table(("entry point without effect", "from", "why"), rows))
    for line in (*listing.observers, *listing.fake_quants):
        if line.problem is not None:
            out(f"\n{line.problem}")


def show_json(listing: Listing) -> None:
    """The same as one document."""
    out_json(asdict(listing))


def _recipes() -> Iterator[RecipeLine]:
    for name in builtin_names():
        yield _recipe(f"builtin:{name}", None, None)
    for point in entry_points(ENTRY_POINT_GROUP):
        yield _recipe(f"{point.distribution}:{point.name}", point.distribution, point.version)


def _recipe(reference: str, distribution: str | None, version: str | None) -> RecipeLine:
    try:
        recipe = load_recipe(reference)
    except RecipeError as error:
        why = f"cannot be used: {error.findings[0].message}"
        return RecipeLine(reference, distribution, version, None, why)
    sentence = " ".join((recipe.description or "").split()).partition(". ")[0]
    return RecipeLine(reference, distribution, version, recipe.backend, sentence.rstrip("."))


def _constructors(kind: Kind) -> Iterator[ConstructorLine]:
    for name in known_names(kind):
        problem = None if name in _torchs(kind) else _problem(kind, name)
        found = signature(kind, name)
        if problem is not None or found is None:
            yield ConstructorLine(name, _origin(kind, name), (), None, problem)
        else:
            arguments = tuple(found.parameters)
            yield ConstructorLine(name, _origin(kind, name), arguments, found.target)


def _arguments(line: ConstructorLine) -> str:
    return ", ".join(line.arguments) if line.problem is None else "cannot be used, see below"


def _torchs(kind: Kind) -> Collection[str]:
    return OBSERVERS if kind == "observer" else FAKE_QUANTS


def _origin(kind: Kind, name: str) -> str:
    if name in _torchs(kind):
        return "torch"
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


def _ignored() -> Iterator[IgnoredLine]:
    for point in misnamed():
        mend = 'it is not named "observer.NAME" or "fake_quant.NAME" with a plain name'
        yield IgnoredLine(point.name, f"{point.distribution} {point.version}", mend)
    for claim in every_claim():
        if claim.name in _torchs(claim.kind):
            problem = "the name belongs to torch"
            yield IgnoredLine(f"{claim.kind}.{claim.name}", str(claim), problem)


def _backends() -> Iterator[BackendLine]:
    names: tuple[str, ...] = get_args(Backend)
    if importlib.util.find_spec("torch") is None:
        for name in names:
            yield BackendLine(name, None, "torch is not installed")
        return
    import torch

    from qrecipe.execution.engine import ENGINES, available_engines

    for name in names:
        if name not in ENGINES:
            yield BackendLine(name, False, "for export only: torch has no kernels for it")
        elif name in available_engines():
            yield BackendLine(name, True, "")
        else:
            yield BackendLine(name, False, f"torch {torch.__version__} lacks its engine here")


def _yes_or_no(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "unknown"}[value]
