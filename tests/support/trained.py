"""A network that is trained on real digits, with a fixed seed, in a minute."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from corpus import torchvision
from torch import nn


def mobilenet(digits: ModuleType) -> nn.Module:
    """A MobileNetV2 of a quarter of the width after three epochs.

    ``digits`` is the module of the example.
    """
    torch.manual_seed(0)
    settings = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2], [6, 64, 2, 1]]
    net = torchvision("models").MobileNetV2(10, 0.25, settings)
    net.features[0][0] = nn.Conv2d(1, net.features[0][0].out_channels, 3, 1, 1, bias=False)
    images, labels = digits.training_digits()
    optimizer = torch.optim.AdamW(net.parameters())
    batches = [batch for _ in range(3) for batch in torch.randperm(len(images)).split(64)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, len(batches))
    for batch in batches:
        loss = F.cross_entropy(net(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    trained: nn.Module = net.eval()
    return trained
