"""The dotted names by which recipes call classes."""

from __future__ import annotations

from torch import nn


def class_names(kind: type) -> frozenset[str]:
    """The dotted names of a class in rules: the internal one, and torch's public one."""
    names = {f"{kind.__module__}.{kind.__qualname__}"}
    if getattr(nn, kind.__name__, None) is kind:
        names.add(f"torch.nn.{kind.__name__}")
    return frozenset(names)


def base_names(kind: type) -> frozenset[str]:
    """The dotted names of the module base classes of a class."""
    bases = [base for base in kind.__mro__[1:] if issubclass(base, nn.Module)]
    return frozenset(name for base in bases if base is not nn.Module for name in class_names(base))
