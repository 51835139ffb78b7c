"""What a model consists of, as plain data: operations, their members and the modules around them.

Rules are resolved against these values alone, so that the resolver knows no executor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Mode = Literal["static", "dynamic", "weight_only"]
"""How an operation is quantized: by ranges that are kept, found anew in each run, or not at all."""

Kind = Literal["observed", "fixed_qparams", "passthrough", "unmatched"]
"""How a backend treats an operation.

``observed``: has a range of its own; ``fixed_qparams``: its range is known beforehand (sigmoid);
``passthrough``: copies or reshapes and follows its producer; ``unmatched``: no quantized kernel.
"""


@dataclass(frozen=True, slots=True)
class Member:
    """One call of a module or function, before fusion.

    ``name`` is the call's address (``layer1.0:add#1``); ``module`` is the canonical path for a
    module and None for a function; ``types`` are the dotted names of the module's class;
    ``functions`` the function's family and dotted names; ``scopes`` the paths of the modules
    around it, nearest first, a module itself included, the root ("") last.
    """

    name: str
    op: str
    module: str | None
    types: frozenset[str]
    functions: frozenset[str]
    scopes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Operation:
    """A site as the model has it: something that quantization can decide about.

    ``members`` are in order of execution and the first one names the operation; ``producers`` are
    the operations that compute its floating tensor inputs, ``model_inputs`` the names of the
    model's inputs that it reads itself, ``stored`` those of parameters and buffers that it reads
    as data, weights and biases apart; ``is_output`` tells that the model returns its result.
    """

    members: tuple[Member, ...]
    kind: Kind
    producers: tuple[str, ...]
    model_inputs: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()
    is_output: bool = False

    @property
    def name(self) -> str:
        return self.members[0].name

    @property
    def op(self) -> str:
        return "+".join(member.op for member in self.members)


@dataclass(frozen=True, slots=True)
class ModelStructure:
    """Every operation of a model in order of execution, and every module it has.

    ``modules`` maps each canonical path, called or not, to the dotted names of its class, ``bases``
    to those of the classes that it derives from; ``aliases`` maps further paths of one module to
    the canonical one; ``roots`` are the paths outside of which nothing is traced, none for the
    whole model.
    """

    operations: tuple[Operation, ...]
    modules: Mapping[str, frozenset[str]]
    bases: Mapping[str, frozenset[str]]
    aliases: Mapping[str, str]
    roots: tuple[str, ...] = ()


NO_STRUCTURE = ModelStructure((), {}, {}, {})


def joined(path: str, name: str) -> str:
    """The name of something inside a module: ``a`` and ``b`` -> ``a.b``."""
    return f"{path}.{name}" if path and name else path or name


def enclosing(path: str) -> tuple[str, ...]:
    """A module's path and those of the modules around it: ``a.b`` -> ``a.b``, ``a``, ``""``."""
    parts = path.split(".") if path else []
    return tuple(".".join(parts[:count]) for count in range(len(parts), -1, -1))
