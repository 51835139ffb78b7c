"""The architectures of the gallery, each a factory for `qrecipe plan --model`.

A factory returns a model in eval mode and an example input: one image, or one sequence of tokens.
All weights are random, from a fixed seed, so nothing here says anything about accuracy. Parameters
that start at zero get other values, and BatchNorm statistics come from random images, so that every
layer affects the output.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from sequence_nets import VOCABULARY, LanguageModel, TransformerEncoder
from torch import Tensor, nn

CLASSES = 10
IMAGE_SIZE = 224
TOKENS = 64
WARMING_BATCHES = 6
WARMING_SIZE = 4

Example = tuple[nn.Module, tuple[Tensor]]
"""A model and its inputs."""


def convnext_tiny() -> Example:
    """Depthwise 7x7 convolutions, LayerNorm and pairs of linear layers with GELU."""
    return _image_classifier("convnext_tiny")


def densenet121() -> Example:
    """BatchNorm and ReLU before each convolution, and concatenations of all earlier outputs."""
    return _image_classifier("densenet121")


def efficientnet_b0() -> Example:
    """Inverted residuals with squeeze-and-excitation and SiLU."""
    return _image_classifier("efficientnet_b0")


def language_model() -> Example:
    """An embedding, two layers of LSTM and a linear layer for the next token."""
    return _token_model(LanguageModel)


def mobilenet_v3_small() -> Example:
    """Inverted residuals with squeeze-and-excitation and Hardswish."""
    return _image_classifier("mobilenet_v3_small")


def resnet18() -> Example:
    """Residual blocks of 3x3 convolutions."""
    return _image_classifier("resnet18")


def shufflenet_v2_x1_0() -> Example:
    """Channels that are split in half and shuffled."""
    return _image_classifier("shufflenet_v2_x1_0")


def swin_t() -> Example:
    """Attention in shifted windows."""
    return _image_classifier("swin_t")


def transformer_encoder() -> Example:
    """An embedding and four encoder layers."""
    return _token_model(TransformerEncoder)


def vit_b_16() -> Example:
    """A vision transformer on patches of 16x16."""
    return _image_classifier("vit_b_16")


FACTORIES: dict[str, Callable[[], Example]] = {
    factory.__name__: factory
    for factory in (
        convnext_tiny,
        densenet121,
        efficientnet_b0,
        language_model,
        mobilenet_v3_small,
        resnet18,
        shufflenet_v2_x1_0,
        swin_t,
        transformer_encoder,
        vit_b_16,
    )
}


def similar(example: Tensor, generator: torch.Generator) -> Tensor:
    """Another random input of the same shape and kind as an example."""
    if example.is_floating_point():
        return torch.randn(example.shape, generator=generator)
    return torch.randint(VOCABULARY, example.shape, generator=generator)


def _image_classifier(name: str) -> Example:
    torch.manual_seed(0)
    build: Any = getattr(_torchvision()[0], name)
    model: nn.Module = build(weights=None, num_classes=CLASSES)
    _wake(model)
    _warm_batch_norm(model)
    return model.eval(), (_images(1),)


def _token_model(build: Callable[[], nn.Module]) -> Example:
    torch.manual_seed(0)
    return build().eval(), (torch.randint(VOCABULARY, (1, TOKENS)),)


def _images(count: int) -> Tensor:
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE)


@torch.no_grad()
def _wake(model: nn.Module) -> None:
    """New values for parameters that start near zero, such as layer scales and zero heads."""
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):
            parameter.fill_(0.5)
        elif name.endswith("weight") and not parameter.any():
            parameter.normal_(std=0.05)


@torch.no_grad()
def _warm_batch_norm(model: nn.Module) -> None:
    """Take statistics from random images: with initial ones some of these nets return only zeros.

    Biases of 1 keep most ReLUs open: with half of them closed, a deep random net amplifies every
    small difference, and outputs would be indistinguishable from rounding noise.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the plain average
        nn.init.ones_(norm.bias)
    if norms:
        model.train()
        for _ in range(WARMING_BATCHES):
            model(_images(WARMING_SIZE))


@lru_cache(maxsize=1)
def _torchvision() -> tuple[ModuleType, Any]:
    """`torchvision.models`, and an object that has to stay alive for it."""
    try:
        return importlib.import_module("torchvision.models"), None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    # torchvision's kernels may not load with a CPU-only build of torch. Its import looks up two of
    # their operators, which no classifier calls, so declaring them is enough.
    fragment: Any = torch.library.Library
    library = fragment("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision.models"), library
