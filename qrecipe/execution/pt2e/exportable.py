"""A loaded program, for exporters that know operators and no programs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qrecipe.execution.part import Exportable
from qrecipe.execution.plain_scales import with_plain_scales
from qrecipe.model.addresses import is_conversion, quantizes_tensor
from qrecipe.model.call import Inputs, bind
from qrecipe.model.interpreter import Interpreter


def exportable(converted: fx.GraphModule, inputs: Inputs) -> Exportable:
    """The program with one call of it, and with what it gives without rounding tensors.

    The weights of that are rounded: those of the float model are not in a file.
    """
    args = bind(converted, converted, inputs)
    with torch.no_grad():
        output = inputs.cloned().call(converted)
        as_float = _Unrounded(converted).run(*bind(converted, converted, inputs.cloned()))
    return Exportable(with_plain_scales(converted), args, output, as_float)


class _Unrounded(Interpreter):
    """Runs a program whose tensors pass conversions as they are; weights are restored."""

    def run_node(self, n: fx.Node) -> Any:
        is_of_tensor = is_conversion(n) and quantizes_tensor(n.all_input_nodes[0])
        passes = quantizes_tensor(n) or is_of_tensor
        return self.env[n.all_input_nodes[0]] if passes else super().run_node(n)
