"""Explicit padding: torch's reference convolutions pad with zeros, whatever the padding mode."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx, nn

_REFERENCE = "torch.ao.nn.quantized.reference."


def pad_explicitly(reference: fx.GraphModule) -> None:
    """Pad explicitly where the convolutions of a reference model would pad wrongly, in place."""
    for node in list(reference.graph.nodes):
        if node.op != "call_module":
            continue
        for module in reference.get_submodule(str(node.target)).modules():
            if _forgets_its_mode(module):
                _pad_before(node, module)
    reference.recompile()


def _forgets_its_mode(module: nn.Module) -> bool:
    is_reference = type(module).__module__.startswith(_REFERENCE)
    return is_reference and getattr(module, "padding_mode", "zeros") != "zeros"


def _pad_before(node: fx.Node, convolution: Any) -> None:
    widths = tuple(convolution._reversed_padding_repeated_twice)
    with node.graph.inserting_before(node):
        padded = node.graph.call_function(F.pad, (node.args[0], widths, convolution.padding_mode))
    node.update_arg(0, padded)
    convolution.padding = (0,) * len(convolution.kernel_size)
    convolution.padding_mode = "zeros"
