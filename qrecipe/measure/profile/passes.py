"""Models that time their sites and boundaries while they run.

The keys are a site's name, a boundary, or the empty name for everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from qrecipe.execution.provenance import converted_graphs
from qrecipe.execution.watched import See, Watched, watched_modules
from qrecipe.measure.turns import Pass, Stopwatch
from qrecipe.model.addresses import is_conversion, site_of
from qrecipe.model.call import Inputs
from qrecipe.model.copies import with_parts
from qrecipe.model.graph_sites import Inventory
from qrecipe.process.threads import clock
from qrecipe.rules.structure import joined

Direction = Literal["quantize", "dequantize"]


@dataclass(frozen=True, slots=True)
class Boundary:
    """One tensor, named after the site that computes it or the input that it is."""

    direction: Direction
    tensor: str


def input_name(path: str, name: str) -> str:
    """The tensor that is an input of a part, the whole model (an empty path) or a root."""
    return f"input {joined(path, name)}"


def boundary_of(node: fx.Node, path: str) -> Boundary | None:
    """The boundary that a node of the converted graph at a path crosses, if it crosses one."""
    if not is_conversion(node):
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    direction: Direction = "dequantize" if node.op == "call_method" else "quantize"
    if source.op == "placeholder":
        return Boundary(direction, input_name(path, str(source.target)))
    return Boundary(direction, site_of(source) or joined(path, source.name))


def float_pass(inventory: Inventory, calls: Sequence[Inputs]) -> Pass:
    """All sites in float."""
    graphs = {part.path: part.graph_module for part in inventory.parts}
    return _pass(inventory.model, graphs, inventory, calls, lambda node, path: site_of(node))


def int8_pass(inventory: Inventory, converted: nn.Module, calls: Sequence[Inputs]) -> Pass:
    """All sites and boundaries of the converted model."""

    def key(node: fx.Node, path: str) -> Hashable:
        return boundary_of(node, path) or site_of(node)

    return _pass(converted, converted_graphs(converted), inventory, calls, key)


def _pass(
    model: nn.Module,
    graphs: Mapping[str, fx.GraphModule],
    inventory: Inventory,
    calls: Sequence[Inputs],
    key: Callable[[fx.Node, str], Hashable],
) -> Pass:
    """The model with its graphs, whose nodes are timed by key, or with its modules."""
    stopwatch = Stopwatch()
    if inventory.untraced is not None:
        watched = watched_modules(
            model, inventory.matches, lambda path, _, seconds: stopwatch.add(path, seconds)
        )
        return Pass.of(watched, calls, stopwatch)

    def see_at(path: str) -> See:
        return lambda node, _, seconds: stopwatch.add(key(node, path) or "", seconds)

    parts = {path: Watched(graph, see_at(path)) for path, graph in graphs.items()}
    return Pass.of(with_parts(model, parts).eval(), calls, stopwatch)


def conversion_pass(converted: nn.Module, calls: Sequence[Inputs]) -> Pass:
    """What it takes to dequantize each quantized result, and to quantize it again."""
    stopwatch = Stopwatch()
    now = clock()

    def see(node: fx.Node, result: Any, seconds: float) -> None:
        site = None if is_conversion(node) else site_of(node)
        is_result = any(site_of(user) != site for user in node.users)
        if site is None or not is_result or not isinstance(result, Tensor):
            return
        if not result.is_quantized or result.qscheme() != torch.per_tensor_affine:
            return
        scale, zero_point = result.q_scale(), result.q_zero_point()
        start = now()
        values = result.dequantize()
        between = now()
        torch.quantize_per_tensor(values, scale, zero_point, result.dtype)
        stopwatch.add(Boundary("quantize", site), now() - between)
        stopwatch.add(Boundary("dequantize", site), between - start)

    parts = {path: Watched(graph, see) for path, graph in converted_graphs(converted).items()}
    return Pass.of(with_parts(converted, parts).eval(), calls, stopwatch)


def in_channels_last(model: nn.Module, calls: Sequence[Inputs]) -> Sequence[Inputs]:
    """The calls with images in the layout that quantized convolutions return.

    They stay as they are if the model does not take them so: ``view`` may need another layout.
    """
    try:
        changed = [inputs.mapped(_channels_last) for inputs in calls]
        for inputs in changed:
            inputs.cloned().call(model)
    except Exception:  # whatever a model raises
        return calls
    return changed


def _channels_last(tensor: Tensor) -> Tensor:
    is_image = tensor.dim() == 4 and tensor.layout == torch.strided
    return tensor.contiguous(memory_format=torch.channels_last) if is_image else tensor
