"""BatchNorms that torchao must not look for: those to fold are folded already.

Its preparation folds each of them into the convolution before it, even if something else reads
that convolution and would then get other values. Its conversion tries again as after training, with
dozens of exports, also in programs that were never trained or have no convolution before a norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_operator: Any = torch.ops.aten.batch_norm.default


def hide_batch_norms(program: fx.GraphModule) -> None:
    """Call the operator by way of a function, in place."""
    _replace(program, _operator, hidden_batch_norm)


def show_batch_norms(program: fx.GraphModule) -> None:
    """Call it directly again, in place."""
    _replace(program, hidden_batch_norm, _operator)


def hidden_batch_norm(*args: Any) -> Any:
    """The operator by another name."""
    return _operator(*args)


def _replace(program: fx.GraphModule, before: Any, after: Any) -> None:
    for node in program.graph.nodes:
        if node.target is before:
            node.target = after
    program.recompile()
