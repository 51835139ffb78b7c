"""What each node of a traced graph computes, and the proof that the graph is the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe.copying import runnable_copy
from qrecipe.errors import Finding, PlanError, first_line
from qrecipe.inputs import Inputs, bind, tensors_in

_RELATIVE_TOLERANCE = 1e-3
_FEW_SAMPLES = 1


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

    Raises ``PlanError``: the model cannot take the inputs (QR307), computes something else than
    its graph, or draws random numbers (QR306).
    """
    few, expected = _outputs(model, inputs)
    args = bind(graph_module, model, few)
    try:
        with torch.no_grad():
            actual = _Recorder(graph_module).run(*args)
    except Exception as error:
        raise _different(f"the traced graph does not run: {first_line(error)}") from error
    if not _equal(expected, actual):
        raise _different("the traced graph computes something else than the model")


def _outputs(model: nn.Module, inputs: Inputs) -> tuple[Inputs, Any]:
    """The model's output for the first samples; for all of them where it needs them."""
    few = inputs.first_samples(_FEW_SAMPLES)
    try:
        return few, _output(model, few)
    except Exception as error:
        if isinstance(error, PlanError):
            raise
        if few is inputs:
            raise _unusable(error) from error
    try:
        return inputs, _output(model, inputs)
    except Exception as error:
        if isinstance(error, PlanError):
            raise
        raise _unusable(error) from error


def _output(model: nn.Module, inputs: Inputs) -> Any:
    copy = runnable_copy(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        before = torch.get_rng_state()
        output = inputs.call(copy)
        if not torch.equal(before, torch.get_rng_state()):
            raise PlanError(
                Finding(
                    "QR306",
                    "the model's forward draws random numbers in eval mode",
                    hint="nothing that is measured on it could be compared; draw them outside",
                )
            )
    return output


def _different(message: str) -> PlanError:
    return PlanError(
        Finding(
            "QR306",
            message,
            hint="tracing loses changes in place through a view or a second name (y = x; y += 1), "
            "and whatever depends on data; write them out of place, or leave the module out: "
            "[fx] non_traceable_module_name",
        )
    )


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
    return Value(any(x.is_floating_point() for x in tensors_in(value)), False)


def _equal(expected: Any, actual: Any) -> bool:
    wanted, given = list(tensors_in(expected)), list(tensors_in(actual))
    return len(wanted) == len(given) and all(map(_close, wanted, given))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    tolerance = _RELATIVE_TOLERANCE * float(a.nan_to_num(0, 0, 0).abs().max()) if a.numel() else 0
    return torch.allclose(a, b, rtol=_RELATIVE_TOLERANCE, atol=tolerance, equal_nan=True)
