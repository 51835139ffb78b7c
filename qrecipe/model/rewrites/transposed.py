"""BatchNorms folded into the transposed convolutions before them.

torch's own method scales the weight as if it had the output channels of all groups, fails if there
are several, and leaves them apart if a ReLU follows, which it fuses with the BatchNorm.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx, nn

from qrecipe.model.addresses import members_of
from qrecipe.model.rewrites.scaled import scaled

TRANSPOSED: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.ConvTranspose1d: nn.BatchNorm1d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.ConvTranspose3d: nn.BatchNorm3d,
}
"""The BatchNorm of each transposed convolution."""


def fold_into_transposed(graph_module: fx.GraphModule, patterns: Collection[Any]) -> None:
    """Fold what a backend with these patterns has a kernel for, in place.

    BatchNorms must be modules in eval mode, and affine. What is not the class itself, or altered,
    must be kept apart already.
    """
    modules = dict(graph_module.named_modules(remove_duplicate=False))
    for node in list(graph_module.graph.nodes):
        convolution: Any = modules.get(str(node.target)) if node.op == "call_module" else None
        if type(convolution) not in TRANSPOSED or type(convolution) not in patterns:
            continue
        if len(node.users) != 1:
            continue
        (reader,) = node.users
        norm = modules.get(str(reader.target)) if reader.op == "call_module" else None
        if type(norm) is not TRANSPOSED[type(convolution)]:
            continue
        graph_module.set_submodule(str(node.target), _folded(convolution, norm))
        node.meta["members"] = (*members_of(node), *members_of(reader))
        node.meta["value"] = reader.meta["value"]
        reader.replace_all_uses_with(node)
        graph_module.graph.erase_node(reader)


def _folded(convolution: nn.Module, norm: Any) -> nn.Module:
    factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scaled(convolution, factor, norm.bias - norm.running_mean * factor)
