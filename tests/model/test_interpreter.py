"""Graphs that are run node by node."""

import pytest
import torch
from torch import fx, nn

from qrecipe.model.interpreter import Interpreter


def test_an_error_stays_that_of_the_node():
    graph_module, x = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4))), torch.rand(2, 5)
    with pytest.raises(RuntimeError) as expected:
        graph_module.get_submodule("0")(x)
    with pytest.raises(RuntimeError) as caught:
        Interpreter(graph_module).run(x)
    assert str(caught.value) == str(expected.value)
