"""Architectures of torchvision with random weights, small inputs and warmed BatchNorm.

`TORCHVISION` maps a name to an `Architecture`, which offers what a `nets.Net` does; `CORPUS` holds
both, the toy nets too. Without torchvision the values are there and cannot be built: `missing()`
says so.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch
from nets import NETS, Net
from torch import nn

_WARMING_BATCHES = 6
_WARMING_SIZE = 8
_CLASSES = {"weights": None, "num_classes": 10}
_SEGMENTS = {"weights": None, "weights_backbone": None, "num_classes": 5}


@cache
def missing() -> str | None:
    """Why torchvision's architectures cannot be built here, None where they can."""
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision is not installed: pip install -c constraints.txt -e '.[corpus]'"
    return None


@lru_cache(maxsize=1)
def _torchvision() -> tuple[ModuleType, Any]:
    """``torchvision.models``, and what must stay alive for it."""
    try:
        return importlib.import_module("torchvision.models"), None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    # torchvision's own kernels do not load beside this build of torch, and its import wants two
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision.models"), library


def torchvision(name: str) -> ModuleType:
    """A module of torchvision, which has to be imported with care."""
    _torchvision()
    return importlib.import_module(f"torchvision.{name}")


@dataclass(frozen=True)
class Architecture:
    """``path`` is the factory's in ``torchvision.models``, ``shape`` that of one batch."""

    path: str
    shape: tuple[int, ...] = (2, 3, 64, 64)
    arguments: Mapping[str, Any] = field(default_factory=lambda: _CLASSES)

    def model(self) -> nn.Module:
        """The model in eval mode, each branch of which can be seen in its output."""
        torch.manual_seed(1)
        factory: Any = _torchvision()[0]
        for name in self.path.split("."):
            factory = getattr(factory, name)
        model = factory(**self.arguments)
        _wake_branches(model)
        _warm_batch_norm(model, self.shape)
        return model.eval()

    def batches(self, count: int = 10) -> list[torch.Tensor]:
        torch.manual_seed(2)
        return [torch.randn(self.shape) for _ in range(count)]


def _wake_branches(model: nn.Module) -> None:
    """Give weight to what starts at nothing: a zero head, a layer scale of one millionth."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layer_scale"):
                parameter.fill_(0.5)
            elif name.endswith("weight") and not parameter.any():
                parameter.normal_(std=0.05)


def _warm_batch_norm(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Give BatchNorm statistics of random inputs; with those of a new layer some nets give 0.

    A deep random net is chaotic besides: with half of the ReLUs shut, every layer amplifies small
    differences, until nothing can be told from rounding noise. Biases of 1 keep most of them open.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # the plain average
        nn.init.ones_(norm.bias)
    if norms:
        model.train()
        with torch.no_grad():
            for _ in range(_WARMING_BATCHES):
                model(torch.randn(_WARMING_SIZE, *shape[1:]))


_SMALL = (2, 3, 32, 32)

TORCHVISION: dict[str, Architecture] = {
    "alexnet": Architecture("alexnet"),
    "convnext_tiny": Architecture("convnext_tiny"),
    "deeplabv3_mobilenet_v3_large": Architecture(
        "segmentation.deeplabv3_mobilenet_v3_large", arguments=_SEGMENTS
    ),
    "densenet121": Architecture("densenet121"),
    "efficientnet_b0": Architecture("efficientnet_b0"),
    "fcn_resnet50": Architecture("segmentation.fcn_resnet50", _SMALL, _SEGMENTS),
    "googlenet": Architecture("googlenet", arguments={**_CLASSES, "init_weights": False}),
    "inception_v3": Architecture(
        "inception_v3", (2, 3, 80, 80), {**_CLASSES, "aux_logits": False, "init_weights": False}
    ),
    "lraspp_mobilenet_v3_large": Architecture(
        "segmentation.lraspp_mobilenet_v3_large", arguments=_SEGMENTS
    ),
    "mnasnet0_5": Architecture("mnasnet0_5"),
    "mobilenet_v2": Architecture("mobilenet_v2"),
    "mobilenet_v3_small": Architecture("mobilenet_v3_small"),
    "r3d_18": Architecture("video.r3d_18", (2, 3, 4, 32, 32)),
    "regnet_y_400mf": Architecture("regnet_y_400mf"),
    "resnet18": Architecture("resnet18"),
    "resnet50": Architecture("resnet50"),
    "resnext50_32x4d": Architecture("resnext50_32x4d", _SMALL),
    "shufflenet_v2_x0_5": Architecture("shufflenet_v2_x0_5"),
    "squeezenet1_1": Architecture("squeezenet1_1"),
    "swin_t": Architecture("swin_t"),
    "swin_v2_t": Architecture("swin_v2_t"),
    "vgg11_bn": Architecture("vgg11_bn", _SMALL),
    "vit_b_16": Architecture("vit_b_16", _SMALL, {**_CLASSES, "image_size": 32}),
}

CORPUS: dict[str, Architecture | Net] = {**TORCHVISION, **NETS}
