"""Products that scale the channels of what linear layers read become calls of their own.

Each is a site of its own, which stays float; the layer after it rounds.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from qrecipe.model.graph_names import outer
from qrecipe.model.nodes import called_modules, store
from qrecipe.model.scaled_input import ScaledLinear, without_scale
from qrecipe.rules.structure import Member, enclosing, joined

SCALES = "scales"
"""Marks, in a node's ``meta``, a product that a transform put there."""

PRODUCT = "smooth"
"""What such a product is called in names and in tables."""


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
