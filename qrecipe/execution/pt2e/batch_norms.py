"""BatchNorms that torchao's conversion must not look for.

It tries to fold each of them into a convolution as after training, with dozens of exports, also in
programs that were never trained and in which no convolution precedes one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_operator: Any = torch.ops.aten.batch_norm.default


def hide_batch_norms(program: fx.GraphModule) -> None:
    """Call the operator by way of a function, in place."""
    _replace(program, _operator, _batch_norm)


def show_batch_norms(program: fx.GraphModule) -> None:
    """Call it directly again, in place."""
    _replace(program, _batch_norm, _operator)


def _batch_norm(*args: Any) -> Any:
    return _operator(*args)


def _replace(program: fx.GraphModule, before: Any, after: Any) -> None:
    for node in program.graph.nodes:
        if node.target is before:
            node.target = after
    program.recompile()
