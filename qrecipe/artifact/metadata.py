"""The metadata of a stored model as values: its origin, and how its tensors are stored.

It is untrusted text until it has been checked here. Nothing imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from qrecipe.artifact.container import Header, StoredFile
from qrecipe.artifact.origin import Origin, bad, checked, origin_of
from qrecipe.model.record import Architecture
from qrecipe.planning.plan import Plan
from qrecipe.recipe.recipe import Rule
from qrecipe.recipe.schema import RecipeTable


class Contents(Origin):
    """The metadata of a stored model.

    ``aliases`` maps a name to the one under which the same tensor is stored; ``layouts`` has the
    order of dimensions in memory, outermost first, of tensors that are not contiguous.
    """

    architecture: Architecture
    aliases: dict[str, str] = Field(default_factory=dict)
    layouts: dict[str, tuple[int, ...]] = Field(default_factory=dict)


def contents_of(header: Header) -> Contents:
    """The contents of a file's metadata.

    Raises ArtifactError if it is not a file of qrecipe (QR505), is from a newer release (QR506), or
    the metadata are damaged or contradict each other (QR505).
    """
    found = origin_of(Contents, header.metadata, header.file)
    _check_names(header, found)
    return found


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A stored model without its tensors, checked as far as possible without the float model."""

    header: Header
    contents: Contents
    plan: Plan
    recipe: RecipeTable
    rules: tuple[Rule, ...]


def stored_model(file: StoredFile) -> StoredModel:
    """What a file says, before its tensors have been read: `StoredFile.check` does that.

    Raises ArtifactError: as `contents_of`; if the parts contradict each other (QR505), or do so
    because the checksum differs (QR504).
    """
    contents = contents_of(file.header)
    with file.damage_first():
        found = checked(contents, file.header.file)
    return StoredModel(file.header, contents, found.plan, found.recipe, found.rules)


def _check_names(header: Header, contents: Contents) -> None:
    """Check that aliases and layouts refer to stored tensors."""
    for name, stored in contents.aliases.items():
        if name in header.tensors or stored not in header.tensors:
            raise bad(header.file, f"aliases: {name} refers to no stored tensor")
    for name, order in contents.layouts.items():
        entry = header.tensors.get(name)
        if entry is None or sorted(order) != list(range(len(entry.shape))):
            raise bad(header.file, f"layouts: {name} has no such dimensions")
