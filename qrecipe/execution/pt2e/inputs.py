"""The checks of a program's inputs, with messages that name the arguments."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe.errors.text import counted
from qrecipe.model.tracer import OTHER_SHAPES

GUARDS = "_guards_fn"
"""The name that torch.export gives to the module which checks the sizes of inputs."""

_HINT = "compile the model for these inputs"


@dataclass(frozen=True, slots=True)
class Expected:
    """A tensor that a program takes, and the argument that it is in."""

    name: str
    dtype: torch.dtype
    rank: int

    def but(self, found: Any) -> str:
        """What was expected, and what came."""
        is_tensor = isinstance(found, Tensor)
        came = _described(found.dtype, found.dim()) if is_tensor else type(found).__name__
        return f"{self.name} must be {_described(self.dtype, self.rank)}, not {came}"


class InputChecks(nn.Module):
    """Checks the tensors of a call against those of the example, before the program computes.

    ``guards`` is what torch.export has assumed of their sizes, if anything. ``expected`` has an
    entry for each value in the arguments; it is None unless the value is a tensor.
    """

    _is_impure = True  # torch.fx reads it, and keeps the call
    needs_values = False
    """Whether ranges are found in each call, which they cannot be of nothing."""

    def __init__(
        self, guards: nn.Module | None, names: Sequence[str], expected: Sequence[Expected | None]
    ) -> None:
        super().__init__()
        self.guards, self.names, self.expected = guards, tuple(names), tuple(expected)

    def forward(self, *args: Any) -> None:
        for value, expected in zip(args, self.expected, strict=False):
            if expected is not None:
                self._check(value, expected)
        if self.guards is None:
            return
        try:
            self.guards(*args)
        except AssertionError as error:
            asked = str(error).removeprefix("Guard failed: ").replace(".size()", ".shape")
            asked = re.sub(r"\bargs_(\d+)", lambda found: self.names[int(found[1])], asked)
            raise AssertionError(f"{OTHER_SHAPES}, which has {asked}; {_HINT}") from error

    def _check(self, value: Any, expected: Expected) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(expected.but(value))
        if not _fits(value.dtype, expected.dtype):
            cast = f"pass {expected.name}.to({expected.dtype})"
            raise TypeError(f"{expected.but(value)}; {cast}")
        if value.dim() != expected.rank:
            raise AssertionError(f"{OTHER_SHAPES}: {expected.but(value)}; {_HINT}")
        if self.needs_values and not value.numel():
            raise ValueError(f"{expected.name} is empty: dynamic layers find no range in it")


def _fits(found: torch.dtype, expected: torch.dtype) -> bool:
    """Integers may have any number of bits, as indices may."""
    return found == expected or (_is_integer(found) and _is_integer(expected))


def _is_integer(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


def _described(dtype: torch.dtype, rank: int) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"a tensor of {name} with {counted(rank, 'dimension')}"


def refuse_empty(converted: fx.GraphModule) -> None:
    """Let a program with dynamic layers refuse empty tensors, in place."""
    checks = getattr(converted, GUARDS, None)
    if isinstance(checks, InputChecks):
        checks.needs_values = True


def check_first(program: fx.GraphModule) -> None:
    """Let a program check its inputs before it computes anything with them, in place."""
    graph = program.graph
    needed = set(graph.find_nodes(op="call_module", target=GUARDS))
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    needed.update(graph.find_nodes(op="placeholder"))
    for node in reversed([node for node in graph.nodes if node in needed]):
        next(iter(graph.nodes)).prepend(node)
