"""Which convolutions read one pixel per channel, whatever the size of the image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qrecipe.model.nodes import module_of

_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_POOLING = (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)
_MEANS = (torch.mean, "mean", torch.amax, "amax")
_IMAGE = ({2, 3}, {-2, -1}, {2, -1}, {-2, 3})
"""How height and width are named."""

_FARTHEST = 16
"""The most operations between the pool and a convolution."""

_ELEMENTWISE = frozenset(
    {
        *("relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "tanh"),
        *("sigmoid", "hardsigmoid", "hardswish", "hardtanh", "clamp", "dropout"),
    }
)


def reads_one_pixel(node: fx.Node) -> bool:
    """Whether the input of a node is (N, C, 1, 1) for images of all sizes.

    It is if it comes from a pool over the whole image, through 1x1 convolutions and activations.
    """
    for _ in range(_FARTHEST):
        if not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
        module = module_of(node)
        if _pools(node, module):
            return True
        if not _keeps_size(node, module):
            return False
    return False


def _pools(node: fx.Node, module: nn.Module | None) -> bool:
    if isinstance(module, _POOLS):
        return module.output_size in (1, (1, 1), [1, 1])
    if node.target in _POOLING:
        return len(node.args) > 1 and node.args[1] in (1, (1, 1), [1, 1])
    return node.target in _MEANS and mean_of_image(node) is True


def mean_of_image(mean: fx.Node) -> bool | None:
    """Whether a mean over height and width keeps them, as one pixel; None if it is over others."""
    given = dict(zip(("dim", "keepdim"), mean.args[1:], strict=False)) | dict(mean.kwargs)
    dims: Any = given.get("dim")
    is_of_image = isinstance(dims, (list, tuple)) and set(dims) in _IMAGE
    return bool(given.get("keepdim", False)) if is_of_image else None


def _keeps_size(node: fx.Node, module: nn.Module | None) -> bool:
    if module is None:
        name = getattr(node.target, "__name__", node.target)
        return node.op in ("call_function", "call_method") and name in _ELEMENTWISE
    first = module[0] if isinstance(module, nn.Sequential) else module  # a fused one
    if isinstance(first, nn.Conv2d):
        return first.kernel_size == (1, 1) and first.padding in ((0, 0), "valid")
    kind = type(module)
    return kind.__module__ == "torch.nn.modules.activation" or kind is nn.Dropout
