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
from qrecipe.model.nodes import called_modules, module_of
from qrecipe.model.rewrites.channel_arithmetic import scaled

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
    for node, convolution in called_modules(graph_module.graph):
        kind = type(convolution)
        if kind not in TRANSPOSED or kind not in patterns or len(node.users) != 1:
            continue
        (reader,) = node.users
        norm = module_of(reader)
        is_norm = type(norm) is TRANSPOSED[kind]
        if not is_norm:
            continue
        factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        shift = norm.bias - norm.running_mean * factor
        graph_module.set_submodule(str(node.target), scaled(convolution, factor, shift))
        node.meta["members"] = (*members_of(node), *members_of(reader))
        node.meta["value"] = reader.meta["value"]
        reader.replace_all_uses_with(node)
        graph_module.graph.erase_node(reader)
