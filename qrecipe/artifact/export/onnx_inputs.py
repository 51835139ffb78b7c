"""The inputs of an ONNX file: plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from qrecipe.model.nested import Packing, parts_of


def take_tensors(model: fx.GraphModule, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Flatten containers that the exporter does not know into tensor inputs, in place.

    Returns the new inputs.
    """
    taken: list[Any] = []
    placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
    first = next(node for node in model.graph.nodes if node.op != "placeholder")
    for node, value in zip(placeholders, inputs, strict=True):
        if _is_known_to_exporter(value):
            taken.append(value)
            continue
        packing = Packing(value, lambda leaf: isinstance(leaf, torch.Tensor))
        taken += packing.open_leaves
        with model.graph.inserting_before(node):
            given = [
                model.graph.placeholder(f"{node.name}_{i}") for i in range(len(packing.open_leaves))
            ]
        with model.graph.inserting_before(first):
            node.replace_all_uses_with(model.graph.call_function(packing, tuple(given)))
        model.graph.erase_node(node)
    model.recompile()
    return tuple(taken)


def _is_known_to_exporter(value: Any) -> bool:
    """Whether the exporter takes an input as it is; a dict at the end would become keywords."""
    is_dict = isinstance(value, dict)
    return not is_dict and all(parts_of(leaf) is None for leaf in pytree.tree_leaves(value))
