"""What stays a single operation inside opened layers, and what an opened layer was."""

from __future__ import annotations

from torch import nn

from qrecipe.model.kept import kept, kept_with

_CLASS = "class"


class Whole(nn.Module):
    """A module that is never traced through: its code depends on shapes and dtypes."""


def note_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Remember the class that a layer has in the caller's model."""
    kept_with(module)[_CLASS] = kind


def class_of_the_caller(module: nn.Module) -> type[nn.Module]:
    """The class of a module in the caller's model, also if it is opened."""
    kind: type[nn.Module] = kept(module, _CLASS) or type(module)
    return kind
