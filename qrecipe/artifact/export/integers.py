"""A program computed in integers, as XNNPACK computes it.

Its kernels add integers and round once, to the grid of the result. The program adds float32, so
what lies in the middle of two integers may be rounded up by one and down by the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qrecipe.artifact.export.integer_kernels import KERNELS, Grid, OnGrid, kernel_before
from qrecipe.model.call import Inputs, bind
from qrecipe.model.interpreter import Interpreter
from qrecipe.model.nested import tensors_in
from qrecipe.model.nodes import stored_value


def in_integers(program: fx.GraphModule, inputs: Inputs) -> list[Tensor]:
    """What a program gives whose operators are computed in integers where XNNPACK does it.

    The others compute in float32. Scales are numbers in the code of the program.
    """
    with torch.no_grad():
        return list(tensors_in(_Integers(program).run(*bind(program, program, inputs.cloned()))))


class _Integers(Interpreter):
    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__(program)
        self.roundings = {kernel_before(node): node for node in program.graph.nodes}

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.roundings:
            return super().run_node(n)
        kernel, made = KERNELS[n.target], self._grid(self.roundings[n])
        args, _ = self.fetch_args_kwargs_from_env(n)
        read = map(self._on_grid, n.args, args[: kernel.operands])
        steps = kernel.steps(n.target, made, *read, *args[kernel.operands :])
        return (steps.double() * made.scale).float()

    def _on_grid(self, restored: Any, values: Tensor) -> OnGrid:
        grid = self._grid(restored)
        scale = grid.scale.double().view(-1, *[1] * (values.dim() - 1))
        return OnGrid((values.double() / scale).round(), grid)

    def _grid(self, conversion: fx.Node) -> Grid:
        scale, zero_point = (stored_value(each) for each in conversion.args[1:3])
        if isinstance(scale, Tensor):  # of a weight, which has no zero point
            return Grid(scale.float(), 0)
        return Grid(torch.tensor(scale, dtype=torch.float32), zero_point)
