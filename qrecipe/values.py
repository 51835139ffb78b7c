"""What each node of a traced graph computes, and the proof that the graph is the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from qrecipe.copying import runnable_copy
from qrecipe.errors import Finding, PlanError, first_line
from qrecipe.inputs import Inputs, bind

_RELATIVE_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Value:
    """What a node computes: ``is_float`` for floating tensors, alone or within a tuple.

    ``is_tensor`` is False for tuples, sizes and numbers.
    """

    is_float: bool
    is_tensor: bool


def record_values(graph_module: fx.GraphModule, model: nn.Module, inputs: Inputs) -> None:
    """Run the graph once and note in each node's ``meta["value"]`` what it computes.

    The caller's model runs on the same few samples, and must give the same: tracing drops what
    it cannot see, such as a change through a view, or a branch on ``self.training``.

    Raises ``PlanError``: the model cannot take the inputs (QR307), or computes something else
    than its graph (QR306).
    """
    few = inputs.few_samples()
    args = bind(graph_module, model, few)
    try:
        expected = _seeded(runnable_copy(model), few)
    except PlanError:
        raise
    except Exception as error:
        if few is not inputs:
            few = inputs
            args = bind(graph_module, model, few)
        try:
            expected = _seeded(runnable_copy(model), few)
        except Exception:
            raise _unusable(error) from error
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        actual = _Recorder(graph_module).run(*args)
    if not _equal(expected, actual):
        raise PlanError(
            Finding(
                "QR306",
                "the traced graph computes something else than the model",
                hint="tracing loses changes in place through a view or a second name (y = x; "
                "y += 1), and whatever depends on data; write them out of place",
            )
        )


def _seeded(model: nn.Module, inputs: Inputs) -> Any:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return inputs.call(model)


def _unusable(error: Exception) -> PlanError:
    return PlanError(
        Finding(
            "QR307",
            f"the model cannot take the example inputs: {first_line(error)}",
            hint="pass the tensors that forward takes, without labels, with a batch dimension",
        )
    )


class _Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta["value"] = _describe(result)
        return result


def _describe(value: Any) -> Value:
    if isinstance(value, Tensor):
        return Value(value.is_floating_point(), True)
    return Value(any(x.is_floating_point() for x in _tensors(value)), False)


def _equal(expected: Any, actual: Any) -> bool:
    pairs = list(zip(_tensors(expected), _tensors(actual), strict=False))
    return len(pairs) == len(_tensors(expected)) and all(_close(a, b) for a, b in pairs)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = _RELATIVE_TOLERANCE * float(a.nan_to_num(0, 0, 0).abs().max()) if a.numel() else 0
    return torch.allclose(a, b, rtol=_RELATIVE_TOLERANCE, atol=tolerance, equal_nan=True)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
