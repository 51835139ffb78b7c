"""Resolves references to recipes, without importing or running anything."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import Distribution, EntryPoint, distributions
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qrecipe.errors.findings import RecipeReferenceError
from qrecipe.errors.spelling import did_you_mean, nearest
from qrecipe.errors.text import one_line, quoted_whole, shown, shown_names
from qrecipe.recipe.toml.document import read_text

MAX_LENGTH = 4_096
"""The longest reference; longer paths cannot be opened, and resolving takes quadratic time."""

ENTRY_POINT_GROUP = "qrecipe.recipes"
"""An entry point ``cnn = "acme_recipes.vision"`` publishes ``acme_recipes/vision/cnn.toml``."""

BUILTIN = "builtin"
_PREFIXED = re.compile(
    r"(?P<owner>[A-Za-z0-9][A-Za-z0-9._-]+):(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)"
)
_PACKAGE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True, slots=True)
class Publisher:
    """The installed distribution that a recipe comes from."""

    name: str
    version: str

    def __str__(self) -> str:
        return one_line(f"{self.name} {self.version}")


@dataclass(frozen=True, slots=True)
class Source:
    """A recipe to read: its name in findings, its file, and the tree that it may refer to.

    ``path`` and ``tree`` have symbolic links resolved, and are None for a text without a file.
    ``text`` is None if it has not been read yet.
    ``publisher`` is None if no distribution publishes it, and for the recipes of qrecipe itself.
    """

    name: str
    path: Path | None = None
    tree: Path | None = None
    publisher: Publisher | None = None
    text: str | None = None

    def read(self) -> Source:
        """The recipe with its text.

        Raises RecipeError (QR001 to QR003) if it cannot be read.
        """
        if self.text is not None:
            return self
        assert self.path is not None, "a source without a path comes with its text"
        assert self.tree is not None
        return replace(self, text=read_text(self.tree, self.path, self.name))

    @property
    def title(self) -> str:
        """The name, with the distribution and its version if there is one."""
        return titled(self.name, self.publisher)


def titled(name: str, publisher: Publisher | None) -> str:
    """A recipe's name in reports: ``acme:cnn (acme 1.0)``."""
    return name if publisher is None else f"{name} ({publisher})"


def is_reference(text: str) -> bool:
    """Whether a text is ``builtin:NAME`` or ``DIST:NAME`` rather than a path."""
    return _PREFIXED.fullmatch(text) is not None


def builtin_names() -> list[str]:
    """The names of the built-in recipes, sorted."""
    return sorted(path.stem for path in _builtin_folder().glob("*.toml"))


def file_source(path: Path, name: str) -> Source:
    """The outermost recipe of a file, which sets the tree.

    Raises RecipeReferenceError (QR001) if the path cannot be one.
    """
    try:
        name.encode()  # plans, lock files and artifacts name it
    except UnicodeEncodeError:
        text = f"cannot read {shown(name)}: its name is not UTF-8 text"
        raise _error("QR001", text, "rename the file") from None
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise _error("QR001", f"cannot read {shown(name)}: {one_line(str(error))}") from None
    return Source(name, resolved, _tree_of(resolved.parent))


def existing_source(path: Path, name: str) -> Source:
    """Like `file_source`, for a file that must exist."""
    source = file_source(path, name)
    if source.path is not None and not os.path.exists(source.path):
        if os.path.exists(path):  # a pipe, which does not resolve to a file
            raise _error("QR001", f"cannot read {shown(name)}: it is not a regular file")
        near = _nearest_file(source.path, name)
        hint = near or (_suggestion(name) if re.fullmatch("[A-Za-z0-9_-]+", name) else None)
        if "=" in name and "\n" in name:
            hint = "parse_recipe takes a recipe as text"
        raise _error("QR001", f"there is no file {shown(name)}", hint)
    return source


def _tree_of(folder: Path) -> Path:
    """The tree that a recipe in that folder may read: its project, or otherwise the folder."""
    for parent in (folder, *folder.parents):
        if (parent / ".git").exists() or (parent / "pyproject.toml").exists():
            return parent
    return folder


def named_source(reference: str) -> Source:
    """The recipe of ``builtin:NAME`` or ``DIST:NAME``.

    Raises RecipeReferenceError (QR120).
    """
    match = _PREFIXED.fullmatch(reference)
    if match is None:
        message = f"{shown(reference)} is not a reference to a recipe"
        raise _error("QR120", message, _suggestion(reference))
    owner, name = match["owner"], match["name"]
    return _builtin_source(name) if owner == BUILTIN else _distributed_source(owner, name)


def relative_source(reference: str, origin: Source) -> Source:
    """The recipe that a recipe at ``origin`` refers to.

    Raises RecipeReferenceError (QR120, QR122).
    """
    if len(reference) > MAX_LENGTH:
        raise _error("QR120", f"a reference has at most {MAX_LENGTH:,} characters")
    if reference.startswith(("/", "\\", "~")) or _DRIVE.match(reference[:2]):
        hint = 'write "./" or "../", "builtin:NAME" or "DIST:NAME"'
        raise _error("QR122", f"{shown(reference)} is not relative to the recipe", hint)
    if not reference.startswith(("./", "../")):
        return named_source(reference)
    if "\\" in reference or "\0" in reference:
        raise _error("QR120", f"{shown(reference)} is not a path", 'separate folders with "/"')
    if origin.path is None or origin.tree is None:
        hint = "pass path= to say where the text belongs"
        raise _error("QR120", f"a text without a path cannot extend {shown(reference)}", hint)
    path = _resolved(origin.path.parent / reference, reference)
    if not path.is_relative_to(origin.tree):
        hint = f"a recipe may only extend files inside {shown(origin.tree.name)}"
        raise _error("QR122", f"{shown(reference)} is outside the tree of the recipe", hint)
    if not os.path.isfile(path):
        if os.path.exists(path):
            raise _error("QR120", f"{shown(reference)} is not a regular file")
        near = _nearest_file(path, reference, besides=origin.path)
        raise _error("QR120", f"there is no recipe {shown(reference)}", near)
    name = _relative_name(reference, path, origin)
    return Source(name, path, origin.tree, origin.publisher)


def _resolved(path: Path, reference: str) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a cycle of links, or a name that is too long
        raise _error("QR120", f"there is no recipe {shown(reference)}") from None


def _relative_name(reference: str, path: Path, origin: Source) -> str:
    """The file relative to how the outermost one was named, or within its package."""
    if is_reference(origin.name) and origin.tree is not None:
        return path.relative_to(origin.tree.parent).as_posix()
    return Path(os.path.normpath(Path(origin.name).parent / reference)).as_posix()


def _nearest_file(path: Path, written: str, besides: Path | None = None) -> str | None:
    """A similarly named recipe in the folder of a missing one, written the same way."""
    if not written.endswith(path.name):  # a dangling link
        return None
    try:
        files = [file for file in path.parent.glob("*.toml") if file.is_file() and file != besides]
    except OSError:
        return None
    for name in nearest(path.name, [file.name for file in files]):
        return f"did you mean {quoted_whole(written.removesuffix(path.name) + name)}?"
    return None


def _suggestion(reference: str) -> str:
    if re.fullmatch(r"[\w./-]+\.toml", reference):
        return f"did you mean {quoted_whole(f'./{reference}')}?"
    for name in nearest(reference, builtin_names()):
        return f'did you mean "{BUILTIN}:{name}"?'
    return 'write "./FILE.toml", "../FILE.toml", "builtin:NAME" or "DIST:NAME"'


def _builtin_folder() -> Path:
    """``recipes`` next to the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def _builtin_source(name: str) -> Source:
    reference = f"{BUILTIN}:{name}"
    if name not in builtin_names():
        known = [f"{BUILTIN}:{known}" for known in builtin_names()]
        hint = did_you_mean(reference, known) or "known: " + ", ".join(known)
        raise _error("QR120", f"there is no recipe {shown(reference)}", hint)
    folder = _builtin_folder()
    return Source(reference, folder / f"{name}.toml", folder)


def _distributed_source(owner: str, name: str) -> Source:
    reference = f"{owner}:{name}"
    installed = _installed(owner)
    if not installed:
        needs = f"needs the distribution {shown(owner)}, which is not installed"
        hint = _suggestion(name) if name in builtin_names() else None
        raise _error("QR120", f"{shown(reference)} {needs}", hint)
    published = [(each, point) for each in installed for point in each.points]
    chosen = [(each, point) for each, point in published if point.name == name]
    if not chosen:
        names = sorted({point.name for _, point in published})
        hint = did_you_mean(name, names) or (
            f"it has {shown_names(names)}" if names else "it publishes none"
        )
        raise _error("QR120", f"{shown(owner)} publishes no recipe {shown(name)}", hint)
    _refuse_versions(owner, installed)
    found = [_published_source(reference, each, point) for each, point in chosen]
    sources = [source for source in found if isinstance(source, Source)]
    if not sources:
        raise next(error for error in found if isinstance(error, RecipeReferenceError))
    return _only_source(reference, sources)


@dataclass(frozen=True, slots=True)
class _Installed:
    """A distribution, its name, and the recipes that it publishes."""

    distribution: Distribution
    publisher: Publisher
    points: tuple[EntryPoint, ...]

    @property
    def place(self) -> str:
        return str(self.distribution.locate_file(""))


def _installed(owner: str) -> list[_Installed]:
    """The distributions of that name, each location once even if the search path repeats it."""
    try:
        found = [_read(each) for each in distributions(name=owner)]
    except Exception:  # the parsers may raise anything on a damaged file
        hint = "reinstall it"
        raise _error("QR120", f"the metadata of {shown(owner)} is damaged", hint) from None
    places = {os.path.realpath(each.place): each for each in reversed(found)}
    return list(places.values())[::-1]


def _read(distribution: Distribution) -> _Installed:
    points = tuple(each for each in distribution.entry_points if each.group == ENTRY_POINT_GROUP)
    name, version = distribution.metadata["Name"], distribution.version
    if not name or not version:
        raise ValueError("without a name or a version")
    return _Installed(distribution, Publisher(name, version), points)


def _refuse_versions(owner: str, installed: list[_Installed]) -> None:
    """Reject several versions: a recipe must not depend on the order of the search path."""
    found = {each.publisher.version: each.place for each in reversed(installed)}
    if len(found) > 1:
        places = " and ".join(f"{version} in {place}" for version, place in found.items())
        raise _error(
            "QR120",
            f"{shown(owner)} is installed {len(found)} times: {one_line(places)}",
            "uninstall all but one",
        )


def _only_source(reference: str, sources: list[Source]) -> Source:
    if len(sources) == 1:
        return sources[0]
    first, *others = (source.read() for source in sources)
    for other in others:
        if other.text != first.text:
            places = one_line(f"{first.path} and {other.path}")
            message = f"{shown(reference)} is published twice with different contents: {places}"
            raise _error("QR120", message, "uninstall all but one")
    return first


def _published_source(
    reference: str, installed: _Installed, point: EntryPoint
) -> Source | RecipeReferenceError:
    """The recipe that an entry point publishes, or the error."""
    if not _PACKAGE.fullmatch(point.value):
        return _error("QR120", f"{shown(reference)} does not name a package: {shown(point.value)}")
    first, *rest = point.value.split(".")
    place = "/".join((first, *rest, f"{point.name}.toml"))
    for root in _roots(installed.distribution, place):
        tree, path = _resolved(root / first, reference), _resolved(root / place, reference)
        if os.path.isfile(path) and path.is_relative_to(tree):
            return Source(reference, path, tree, installed.publisher)
    owner = shown(installed.publisher.name)
    return _error("QR120", f"{shown(reference)} should be {place}, but {owner} has no such file")


def _roots(installed: Distribution, place: str) -> Iterator[Path]:
    """Where a distribution's file may be: installed, or in the project of an editable install."""
    if any(file.as_posix() == place for file in installed.files or ()):
        yield Path(str(installed.locate_file("")))
    try:
        direct = json.loads(installed.read_text("direct_url.json") or "{}")
        url = urlsplit(direct["url"])
        is_editable = url.scheme == "file" and direct["dir_info"]["editable"]
    except (ValueError, KeyError, TypeError):
        return
    if is_editable:
        project = Path(unquote(url.path))
        yield project
        yield project / "src"


def _error(code: str, message: str, hint: str | None = None) -> RecipeReferenceError:
    return RecipeReferenceError.of(code, message, hint=hint)
