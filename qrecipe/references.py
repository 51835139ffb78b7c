"""Where a reference to a recipe leads; nothing that it names is imported or run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit

from qrecipe.errors import Finding, RecipeReferenceError, did_you_mean, nearest, one_line, shown

ENTRY_POINT_GROUP = "qrecipe.recipes"
"""An entry point ``cnn = "acme_recipes.vision"`` publishes ``acme_recipes/vision/cnn.toml``."""

_BUILTIN = "builtin"
_PREFIXED = re.compile(
    r"(?P<owner>[A-Za-z0-9][A-Za-z0-9._-]+):(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)"
)
_PACKAGE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_DRIVE = re.compile(r"[A-Za-z]:")


@dataclass(frozen=True, slots=True)
class Source:
    """A recipe to read: its name in findings, its file, and the tree that it may refer to.

    ``path`` and ``tree`` are resolved, without symbolic links; a text without a file has neither.
    """

    name: str
    path: Path | None = None
    tree: Path | None = None


def is_reference(text: str) -> bool:
    """Whether a text is ``builtin:NAME`` or ``DIST:NAME`` rather than a path."""
    return _PREFIXED.fullmatch(text) is not None


def builtin_names() -> list[str]:
    """The recipes that are shipped, sorted."""
    return sorted(path.stem for path in _builtin_folder().glob("*.toml"))


def path_text(path: object, what: str) -> str:
    """A path as text; ``what`` says in a finding what takes it.

    Raises RecipeReferenceError (QR001) for what is no path.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise _error("QR001", f"{what}, not {shown(type(path).__name__)}")
    return text


def file_source(path: Path, name: str) -> Source:
    """The outermost recipe of a file, which sets the tree.

    Raises RecipeReferenceError (QR001) if the path cannot be one.
    """
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise _error("QR001", f"cannot read {shown(name)}: {one_line(str(error))}") from None
    return Source(name, resolved, _tree_of(resolved.parent))


def existing_source(path: Path, name: str) -> Source:
    """As `file_source`, for a file that has to be there."""
    source = file_source(path, name)
    if source.path is not None and not _exists(source.path):
        near = _nearest_file(source.path, name)
        hint = near or (_suggestion(name) if _is_plain(name) else None)
        raise _error("QR001", f"there is no file {shown(name)}", hint)
    return source


def _is_plain(name: str) -> bool:
    """Whether a name could be meant for a shipped recipe."""
    return re.fullmatch("[A-Za-z0-9_-]+", name) is not None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False


def _tree_of(folder: Path) -> Path:
    """What a recipe of that folder may read: its project, or else the folder."""
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
        raise _error(
            "QR120", f"{shown(reference)} is no reference to a recipe", _suggestion(reference)
        )
    owner, name = match["owner"], match["name"]
    if owner == _BUILTIN:
        return _builtin_source(name)
    return _distributed_source(owner, name)


def relative_source(reference: str, origin: Source) -> Source:
    """What a recipe at ``origin`` refers to.

    Raises RecipeReferenceError (QR120, QR122).
    """
    if _leaves_by_form(reference):
        raise _error(
            "QR122",
            f"{shown(reference)} is not relative to the recipe",
            'write "./" or "../", "builtin:NAME" or "DIST:NAME"',
        )
    if not reference.startswith(("./", "../")):
        return named_source(reference)
    if "\\" in reference or "\0" in reference:
        raise _error("QR120", f"{shown(reference)} is no path", 'separate folders by "/"')
    if origin.path is None or origin.tree is None:
        hint = "say with path= where the text belongs"
        raise _error("QR120", f"a text without a path cannot extend {shown(reference)}", hint)
    path = _resolved(origin.path.parent / reference, reference)
    if not path.is_relative_to(origin.tree):
        raise _error(
            "QR122",
            f"{shown(reference)} leads out of the tree of the recipe",
            f"a recipe may extend what is inside {shown(origin.tree.name)}",
        )
    if not _is_file(path):
        if _exists(path):
            raise _error("QR120", f"{shown(reference)} is no regular file")
        near = _nearest_file(path, reference, besides=origin.path)
        raise _error("QR120", f"there is no recipe {shown(reference)}", near)
    return Source(_relative_name(reference, path, origin), path, origin.tree)


def _leaves_by_form(reference: str) -> bool:
    return reference.startswith(("/", "\\", "~")) or _DRIVE.match(reference[:2]) is not None


def _resolved(path: Path, reference: str) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a circle of links, a name that is too long
        raise _error("QR120", f"there is no recipe {shown(reference)}") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _relative_name(reference: str, path: Path, origin: Source) -> str:
    """The file as seen from where the outermost one was named, or inside its package."""
    if is_reference(origin.name) and origin.tree is not None:
        return path.relative_to(origin.tree.parent).as_posix()
    return Path(os.path.normpath(Path(origin.name).parent / reference)).as_posix()


def _nearest_file(path: Path, written: str, besides: Path | None = None) -> str | None:
    """The recipe in the folder of a missing one that may be meant, written as that one was."""
    if not written.endswith(path.name):  # a link that leads nowhere
        return None
    try:
        files = [file for file in path.parent.glob("*.toml") if file.is_file() and file != besides]
    except OSError:
        return None
    for name in nearest(path.name, [file.name for file in files]):
        return f"did you mean {shown(written.removesuffix(path.name) + name)}?"
    return None


def _suggestion(reference: str) -> str:
    if re.fullmatch(r"[\w./-]+\.toml", reference):
        return f"did you mean {shown(f'./{reference}')}?"
    for name in nearest(reference, builtin_names()):
        return f'did you mean "{_BUILTIN}:{name}"?'
    return 'write "./FILE.toml", "../FILE.toml", "builtin:NAME" or "DIST:NAME"'


def _builtin_folder() -> Path:
    """``recipes`` beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def _builtin_source(name: str) -> Source:
    reference = f"{_BUILTIN}:{name}"
    if name not in builtin_names():
        known = [f"{_BUILTIN}:{known}" for known in builtin_names()]
        hint = did_you_mean(reference, known) or "there are " + ", ".join(known)
        raise _error("QR120", f"there is no recipe {shown(reference)}", hint)
    folder = _builtin_folder()
    return Source(reference, folder / f"{name}.toml", folder)


def _distributed_source(owner: str, name: str) -> Source:
    reference = f"{owner}:{name}"
    try:
        installed = distribution(owner)
    except (PackageNotFoundError, ValueError):
        raise _error(
            "QR120",
            f"{shown(reference)} needs the distribution {shown(owner)}, which is not installed",
            _suggestion(name) if name in builtin_names() else None,
        ) from None
    published = _published_by(installed)
    if name not in published:
        hint = did_you_mean(name, published) or (
            "it has " + ", ".join(map(shown, sorted(published)))
            if published
            else "it publishes none"
        )
        raise _error("QR120", f"{shown(owner)} publishes no recipe {shown(name)}", hint)
    return _published_source(reference, installed, published[name])


def _published_by(installed: Distribution) -> dict[str, EntryPoint]:
    try:
        points = list(installed.entry_points)
    except Exception:  # whatever a damaged file makes of the parser
        return {}
    return {point.name: point for point in points if point.group == ENTRY_POINT_GROUP}


def _published_source(reference: str, installed: Distribution, point: EntryPoint) -> Source:
    if not _PACKAGE.fullmatch(point.value):
        raise _error("QR120", f"{shown(reference)} does not name a package: {shown(point.value)}")
    first, *rest = point.value.split(".")
    place = "/".join((first, *rest, f"{point.name}.toml"))
    for root in _roots(installed, place):
        tree, path = _resolved(root / first, reference), _resolved(root / place, reference)
        if _is_file(path) and path.is_relative_to(tree):
            return Source(reference, path, tree)
    message = f"{shown(reference)} should be {place}, but {shown(installed.name)} has no such file"
    raise _error("QR120", message)


def _roots(installed: Distribution, place: str) -> Iterator[Path]:
    """Where a distribution's file may lie: installed, or in the project of an editable install."""
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
    return RecipeReferenceError(Finding(code, message, hint=hint))
