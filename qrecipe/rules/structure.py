"""A model's structure as plain data: operations, their members and the modules around them.

Rules are resolved against these values only, independently of executors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qrecipe.errors.short import ShortRepr
from qrecipe.recipe.frozen import FrozenMapping

Mode = Literal["static", "dynamic", "weight_only"]
"""How activations are quantized: by stored ranges, by ranges found in each run, or not at all."""

Kind = Literal["observed", "fixed_qparams", "passthrough", "unmatched"]
"""How a backend treats an operation.

``observed``: has its own range; ``fixed_qparams``: its range is known in advance (sigmoid);
``passthrough``: copies or reshapes, and follows its producer; ``unmatched``: no quantized kernel.
"""


@dataclass(frozen=True, slots=True, repr=False)
class Member(ShortRepr):
    """One call of a module or function, before fusion.

    ``name`` is the call's address (``layer1.0:add#1``); ``op`` what it is, empty for a call that is
    a part of what the first member of its site is; ``module`` is the canonical path of a
    module and None for a function; ``types`` are the dotted names of the module's class;
    ``functions`` the function's family and dotted names; ``scopes`` the paths of the enclosing
    modules, nearest first (a module itself included), with the root ("") last.
    """

    name: str
    op: str
    module: str | None = None
    types: frozenset[str] = frozenset()
    functions: frozenset[str] = frozenset()
    scopes: tuple[str, ...] = ("",)


@dataclass(frozen=True, slots=True, repr=False)
class Operation(ShortRepr):
    """A site: an operation, possibly fused, that can be quantized or left float.

    ``members`` are in order of execution, and the first one names the operation; ``producers`` are
    the operations that compute its floating-point inputs, ``model_inputs`` the model inputs that it
    reads directly, ``stored`` the parameters and buffers that it reads as data, except weights and
    biases; ``is_output`` means that the model returns its result; ``is_inserted`` that a transform
    put it there, so that it stays float and no rule counts it.
    """

    members: tuple[Member, ...]
    kind: Kind
    producers: tuple[str, ...]
    model_inputs: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()
    is_output: bool = False
    is_inserted: bool = False

    @property
    def name(self) -> str:
        return self.members[0].name

    @property
    def op(self) -> str:
        return "+".join(member.op for member in self.members if member.op)


@dataclass(frozen=True, slots=True, repr=False)
class ModelStructure(ShortRepr):
    """All operations of a model in order of execution, and all its modules.

    ``modules`` maps each canonical path, called or not, to the dotted names of its class, ``bases``
    to those of its base classes; ``aliases`` maps other paths of a module to the canonical one;
    ``roots`` are the paths that are traced, empty for the whole model, and ``outside`` the layers
    with weights that they leave out; ``idle`` are the calls that only return their input, or
    compute with stored tensors alone: they have no operation.
    """

    operations: tuple[Operation, ...]
    modules: Mapping[str, frozenset[str]]
    bases: Mapping[str, frozenset[str]]
    aliases: Mapping[str, str]
    roots: tuple[str, ...] = ()
    idle: tuple[Member, ...] = ()
    outside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("modules", "bases", "aliases"):
            object.__setattr__(self, name, FrozenMapping(getattr(self, name)))

    def is_traced(self, path: str) -> bool:
        """Whether the module at ``path`` is inside a root or contains one."""
        around = enclosing(path)
        return not self.roots or any(
            root in around or path in enclosing(root) for root in self.roots
        )


NO_STRUCTURE = ModelStructure((), {}, {}, {})


def joined(path: str, name: str) -> str:
    """The path of something inside a module: ``a`` and ``b`` -> ``a.b``."""
    return f"{path}.{name}" if path and name else path or name


def enclosing(path: str) -> tuple[str, ...]:
    """The paths of a module and those around it: ``a.b`` -> ``a.b``, ``a``, ``""``."""
    parts = path.split(".") if path else []
    return tuple(".".join(parts[:count]) for count in range(len(parts), -1, -1))
