"""The dotted names by which recipes call classes, and which classes are one operation."""

from __future__ import annotations

from torch import nn

from qrecipe.recipe.schema import FxTable


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


def is_torchs_own(kind: type) -> bool:
    """Whether tracing treats modules of a class as one operation; containers are not operations."""
    is_container = issubclass(kind, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    return kind.__module__.startswith("torch.nn") and not is_container


def is_leaf(path: str, module: nn.Module, table: FxTable) -> bool:
    """Whether tracing keeps the module at ``path`` whole, by its class or the recipe's table."""
    return (
        path in table.non_traceable_module_name
        or not class_names(type(module)).isdisjoint(table.non_traceable_module_class)
        or is_torchs_own(type(module))
    )
