"""The nets that the benchmarks run on."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a residual addition."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x += identity
        result: Tensor = self.relu(x)
        return result


class ResNet18Like(nn.Module):
    """The layers and widths of ResNet-18, for inputs (N, 3, H, W) and 100 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def warmed(model: nn.Module, *shape: int) -> nn.Module:
    """The model in eval mode, with BatchNorm statistics of six random batches.

    Without them a net with random weights returns only zeros.
    """
    momenta = {m: m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    for norm in momenta:
        norm.momentum = None
    model.train()
    with torch.no_grad():
        for _ in range(6):
            model(torch.randn(*shape))
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    return model.eval()


class InvertedResidual(nn.Module):
    """Pointwise expansion, depthwise 3x3, linear pointwise projection, residual connection."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = channels_in * expansion
        self.expand = _conv_norm(channels_in, width, 1, act=True) if expansion > 1 else None
        self.depthwise = _conv_norm(width, width, 3, stride, width, act=True)
        self.project = _conv_norm(width, channels_out, 1, act=False)
        self.has_residual = stride == 1 and channels_in == channels_out

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        result: Tensor = x + y if self.has_residual else y
        return result


def _conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, *, act: bool
) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(outputs)
    return nn.Sequential(conv, norm, nn.ReLU()) if act else nn.Sequential(conv, norm)


class MobileNetV2Like(nn.Module):
    """The layers and widths of MobileNetV2 with ReLU, for inputs (N, 3, H, W) and 100 classes."""

    def __init__(self) -> None:
        super().__init__()
        layout = [
            *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
            *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
        ]
        blocks: list[nn.Module] = []
        channels = 32
        for expansion, width, count, stride in layout:
            for index in range(count):
                step = stride if index == 0 else 1
                blocks.append(InvertedResidual(channels, width, step, expansion))
                channels = width
        self.stem = _conv_norm(3, 32, 3, 2, act=True)
        self.blocks = nn.Sequential(*blocks)
        self.last = _conv_norm(channels, 1280, 1, act=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1280, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.last(self.blocks(self.stem(x))))
        logits: Tensor = self.fc(torch.flatten(x, 1))
        return logits


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each after a LayerNorm and with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.softmax = nn.Softmax(-1)
        self.up, self.gelu, self.down = (
            *(nn.Linear(width, 4 * width), nn.GELU()),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        shape = (x.shape[0], x.shape[1], self.heads, x.shape[2] // self.heads)
        query, key, value = (
            linear(y).reshape(shape).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        scores = torch.matmul(query * shape[-1] ** -0.5, key.transpose(2, 3))
        mixed = torch.matmul(self.softmax(scores), value).transpose(1, 2).reshape(x.shape)
        x = x + self.out(mixed)
        result: Tensor = x + self.down(self.gelu(self.up(self.norm2(x))))
        return result


class Encoder(nn.Module):
    """A transformer encoder over (N, tokens, width), mean-pooled to 100 classes."""

    def __init__(self, layers: int = 6, width: int = 192, heads: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(EncoderLayer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 100)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.norm(self.layers(x)).mean(1))
        return logits


class Chain(nn.Module):
    """A chain of 3x3 convolutions with BatchNorm and ReLU, (N, 3, H, W) to 10 classes."""

    def __init__(self, layers: int, width: int = 32) -> None:
        super().__init__()
        widths = [3, *[width] * (layers - 1)]
        self.body = nn.Sequential(*(_conv_norm(w, width, 3, act=True) for w in widths))
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.body(x).mean((2, 3)))
        return logits


class LinearChain(nn.Module):
    """Linear layers with ReLU, (N, width) to (N, width); nearly the identity, so nothing fades."""

    def __init__(self, layers: int, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(each for _ in range(layers) for each in (nn.Linear(width, width), nn.ReLU()))
        )
        with torch.no_grad():
            for layer in self.body:
                if isinstance(layer, nn.Linear):
                    layer.weight.copy_(torch.eye(width) + 0.01 * torch.randn(width, width))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x)
        return result


class Residual(nn.Module):
    """A 3x3 convolution with BatchNorm, a residual addition and ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.relu(self.bn(self.conv(x)) + x)
        return result


class ResidualChain(nn.Module):
    """Residual blocks of one convolution each, (N, channels, H, W) to the same shape."""

    def __init__(self, layers: int, channels: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(*(Residual(channels) for _ in range(layers)))
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x)
        return result
