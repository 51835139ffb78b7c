"""A program as runtimes make integer kernels of it, with the same results.

A runtime looks for DequantizeLinear, an operator and QuantizeLinear in a row. What stands between
them keeps the operator float.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qrecipe.execution.plain_scales import spell_out
from qrecipe.model.nodes import stored

_QUANTIZE = "quantized_decomposed.quantize_per_"
_ROUND = "quantized_decomposed.quantize_per_tensor.default"
_RESTORE = "quantized_decomposed.dequantize_per_tensor.default"
_CLAMPS = ("aten.relu", "aten.relu6", "aten.hardtanh", "aten.clamp")
_PADS = ("aten.pad", "aten.constant_pad_nd")


def make_fusable(graph_module: fx.GraphModule) -> None:
    """Change a program of aten operators in place: its integers stay the same."""
    fold_weights(graph_module)
    for node in list(graph_module.graph.nodes):
        if _name(node) in _CLAMPS:
            _round_before(node)
        elif _name(node) in _PADS and not any(_numbers(node.args[1])):
            node.replace_all_uses_with(node.all_input_nodes[0])
    for node in list(graph_module.graph.nodes):
        if str(node.target) == _ROUND:
            _leave_out(node)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def fold_weights(graph_module: fx.GraphModule) -> None:
    """Replace the float values of each weight by its integers, in place."""
    for number, node in enumerate(list(graph_module.graph.nodes)):
        if not str(node.target).startswith(_QUANTIZE) or node.args[0].op != "get_attr":
            continue
        name = f"quantized_weight_{number}"
        args = (stored(arg) if isinstance(arg, fx.Node) else arg for arg in node.args)
        with torch.no_grad():
            graph_module.register_buffer(name, node.target(*args))
        with graph_module.graph.inserting_before(node):
            integers = graph_module.graph.get_attr(name)
        node.replace_all_uses_with(integers)
        for user in list(integers.users):
            spell_out(user)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def _name(node: fx.Node) -> str:
    """The operator without its overload; whether it works in place makes no difference here."""
    return str(node.target).rpartition(".")[0].removesuffix("_")


def _round_before(clamp: fx.Node) -> None:
    """Round the operand of a clamp as its result is rounded, in place.

    A layer followed by a clamp is an integer kernel if rounding does the clamping. Otherwise, as
    after a ReLU that shares its range with negative numbers, onnxruntime leaves the layer float
    unless it is rounded first. Both give the same integers, since rounding keeps the order.
    """
    roundings = list(clamp.users)
    source = clamp.args[0]
    if not roundings or str(roundings[0].target) != _ROUND or not isinstance(source, fx.Node):
        return
    first = roundings[0]
    same = all(str(user.target) == _ROUND and _grid(user) == _grid(first) for user in roundings)
    if not same or len(source.users) > 1 or str(source.target) == _RESTORE:
        return
    if _clamps_nothing(clamp, torch.tensor([-torch.inf, torch.inf]), first) or _is_symmetric(first):
        return
    with clamp.graph.inserting_before(clamp):
        rounded = clamp.graph.node_copy(first, lambda _: source)
        restored = clamp.graph.call_function(
            torch.ops.quantized_decomposed.dequantize_per_tensor.default,
            (rounded, *first.args[1:]),
        )
    clamp.replace_input_with(source, restored)


def _is_symmetric(rounding: fx.Node) -> bool:
    """As for TensorRT, which fuses a layer and a ReLU itself."""
    return rounding.args[2:6:3] == (0, torch.int8)


def _leave_out(rounding: fx.Node) -> None:
    """Leave out a rounding to a grid on which its operand already is, in place.

    It stays there where a clamp only changes what is beyond the grid. onnxruntime would compute
    that in float.
    """
    idle = rounding.args[0]
    assert isinstance(idle, fx.Node)
    restored = idle.all_input_nodes[0] if _is_idle(idle, rounding) else idle
    if str(restored.target) == _RESTORE and _steps(restored) == _steps(rounding):
        rounding.replace_all_uses_with(restored.all_input_nodes[0])


def _is_idle(node: fx.Node, rounding: fx.Node) -> bool:
    if _name(node) not in _CLAMPS or len(node.all_input_nodes) > 1:
        return False
    _, _, low, high, _ = _grid(rounding)
    return _clamps_nothing(node, _restored(torch.arange(low, high + 1), rounding), rounding)


def _clamps_nothing(clamp: fx.Node, values: Tensor, rounding: fx.Node) -> bool:
    """Whether a clamp leaves the integers that values are rounded to."""
    operator: Any = clamp.target
    clamped = operator(values.clone(), *clamp.args[1:], **clamp.kwargs)
    return torch.equal(_rounded(values, rounding), _rounded(clamped, rounding))


def _grid(node: fx.Node) -> tuple[Any, ...]:
    """Scale, zero point, limits and dtype; files have no limits but those of the dtype."""
    scale, zero_point, *_, dtype = node.args[1:6]
    limits = torch.iinfo(dtype)  # type: ignore[arg-type]
    return scale, zero_point, limits.min, limits.max, dtype


def _steps(node: fx.Node) -> tuple[Any, ...]:
    """Scale, zero point and dtype: dequantizing knows no limits."""
    return (*node.args[1:3], node.args[5])


def _rounded(values: Tensor, rounding: fx.Node) -> Tensor:
    operator: Any = rounding.target
    finite = values.clamp(-1e30, 1e30)  # infinity has no integer
    rounded: Tensor = operator(finite, *_grid(rounding))
    return rounded


def _restored(integers: Tensor, rounding: fx.Node) -> Tensor:
    scale, zero_point, low, high, dtype = _grid(rounding)
    operator = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    restored: Tensor = operator(integers.to(dtype), scale, zero_point, low, high, dtype)
    return restored


def _numbers(widths: object) -> Sequence[object]:
    return widths if isinstance(widths, (list, tuple)) else (widths,)
