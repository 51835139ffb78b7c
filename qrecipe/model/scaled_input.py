"""Linear layers that scale the channels of their input first, by a product in float.

Product and layer are one module, with the path and the parameters of the layer. In a graph they are
two calls: the product is a site of its own, which stays float, and the layer after it rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qrecipe.model.copies import structural_copy
from qrecipe.model.graph_names import outer
from qrecipe.model.nodes import called_modules, store
from qrecipe.model.opened.whole import Whole, note_class
from qrecipe.model.sharing import linear
from qrecipe.rules.structure import Member, enclosing, joined

SCALES = "scales"
"""Marks, in a node's ``meta``, a product that a transform put there."""

PRODUCT = "smooth"
"""What such a product is called in names and in tables."""


class ScaledLinear(Whole, nn.Linear):
    """A linear layer of ``input * input_factor``, with a factor for each channel. [in_features]"""

    input_factor: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input * self.input_factor, self.weight, self.bias)


def scale_input(layer: nn.Module, factor: Tensor) -> None:
    """Let a linear layer multiply its input by ``factor``, in place; 1 undoes what was done."""
    if isinstance(layer, ScaledLinear):
        factor = layer.input_factor * factor
    if bool((factor == 1).all()):
        layer.__class__ = nn.Linear
        layer._buffers.pop("input_factor", None)
        return
    layer.__class__ = ScaledLinear
    note_class(layer, nn.Linear)
    layer.register_buffer("input_factor", factor)


def with_scaled_inputs(model: nn.Module, groups: Iterable[Sequence[str]]) -> nn.Module:
    """A copy with products of any value before the linear layers of groups; it shares all tensors.

    Modules that are scaled already, or are not linear, stay as they are.
    """
    copied = structural_copy(model)
    modules = dict(copied.named_modules())
    for paths in groups:
        layers = [modules[path] for path in paths if path in modules]
        plain = [layer for layer in layers if type(layer) is nn.Linear]
        shared = [layer.weight.new_full((layer.in_features,), 0.5) for layer in plain[:1]]
        for layer in plain:
            scale_input(layer, shared[0])
    return copied


def class_without_scale(module: nn.Module) -> type[nn.Module]:
    """The class of a module, as if it had no product before it."""
    return nn.Linear if isinstance(module, ScaledLinear) else type(module)


def without_scale(layer: ScaledLinear) -> nn.Linear:
    """The plain linear layer; it shares the parameters."""
    return linear(layer.weight, layer.bias).train(layer.training)


def spell_out_scales(graph_module: fx.GraphModule, prefix: str) -> None:
    """Put the products of scaled layers before them, in place; ``prefix`` is the graph's path.

    Layers that read the same tensor and scale it alike share one.
    """
    graph, made = graph_module.graph, dict[tuple[fx.Node, int], fx.Node]()
    for node, layer in called_modules(graph):
        if not isinstance(layer, ScaledLinear):
            continue
        (source,) = node.all_input_nodes
        key = source, id(layer.input_factor)
        if key not in made:
            name = f"{str(node.target).replace('.', '_')}_factor"
            path = store(layer.input_factor, name, graph_module)
            with graph.inserting_before(node):
                factor = graph.get_attr(path)
                product = graph.call_function(torch.mul, (source, factor))
            factor.meta["value"] = replace(source.meta["value"], rank=1, is_input=False)
            product.meta["value"] = replace(source.meta["value"], is_input=False)
            at = joined(prefix, outer(str(node.target)))
            member = Member(f"{at}:{PRODUCT}", PRODUCT, scopes=enclosing(at))
            product.meta |= {SCALES: True, "member": member}
            made[key] = product
        node.replace_input_with(source, made[key])
        graph_module.set_submodule(str(node.target), without_scale(layer))
    if made:
        graph_module.recompile()
