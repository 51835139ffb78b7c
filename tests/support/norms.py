"""BatchNorm in the spellings that models use, each equal to torch's own module, for tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class NormAct(nn.BatchNorm2d):
    """With its activation inside, its forward written again, as mobile nets do."""

    def __init__(self, features, act=nn.ReLU, **settings):
        super().__init__(features, **settings)
        self.drop, self.act = nn.Identity(), act()

    def forward(self, x):
        torch._assert(x.ndim == 4, "expected 4 dimensions")
        share = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                share = 1.0 / float(self.num_batches_tracked)
        of_batch = self.training or self.running_mean is None
        mean, var = self.running_mean, self.running_var
        x = F.batch_norm(x, mean, var, self.weight, self.bias, of_batch, share, self.eps)
        return self.act(self.drop(x))


class Inherited(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class Renamed(nn.BatchNorm2d):
    """Only another name."""


class Function(nn.Module):
    """The function with tensors of its own, called by ``spelling``."""

    def __init__(self, features, spelling):
        super().__init__()
        self.spelling = spelling
        self.scale = nn.Parameter(torch.linspace(0.5, 2, features))
        self.shift = nn.Parameter(torch.zeros(features))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("var", torch.ones(features))

    def forward(self, x):
        return self.spelling(self, x)


SPELLINGS = {
    "activation inside": NormAct,
    "cumulative": lambda n: NormAct(n, momentum=None),
    "not affine": lambda n: NormAct(n, affine=False),
    "inherited": Inherited,
    "renamed": Renamed,
    "by position": lambda n: Function(
        n,
        lambda self, x: F.batch_norm(
            x, self.mean, self.var, self.scale, self.shift, self.training, 0.1, 1e-5
        ),
    ),
    "by keyword": lambda n: Function(
        n,
        lambda self, x: F.batch_norm(
            input=x,
            running_var=self.var,
            bias=self.shift,
            weight=self.scale,
            training=self.training,
            running_mean=self.mean,
        ),
    ),
    "torch.batch_norm": lambda n: Function(
        n,
        lambda self, x: torch.batch_norm(
            x, self.scale, self.shift, self.mean, self.var, self.training, 0.1, 1e-5, False
        ),
    ),
}


def norm_net(norm):
    """The norm between two convolutions."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm, nn.Conv2d(8, 4, 1), nn.ReLU())


def warmed(model, batch):
    """The model in eval mode, with statistics of random batches."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand_like(batch))
    return model.eval()


class Frozen(nn.Module):
    """A BatchNorm as sums and products with buffers, as detectors have it."""

    def __init__(self, features):
        super().__init__()
        self.register_buffer("weight", torch.linspace(0.5, 2, features))
        self.register_buffer("bias", torch.linspace(-1, 1, features))
        self.register_buffer("mean", torch.full((features,), 0.1))
        self.register_buffer("var", torch.full((features,), 0.3))

    def forward(self, x):
        torch._assert(x.ndim == 4, "expected 4 dimensions")
        scale = self.weight.reshape(1, -1, 1, 1) * (self.var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(1, -1, 1, 1) - self.mean.reshape(1, -1, 1, 1) * scale)


class Spelt(nn.Module):
    """A BatchNorm as arithmetic with parameters, by a function of it and them."""

    def __init__(self, features, spelling):
        super().__init__()
        self.spelling = spelling
        self.weight = nn.Parameter(torch.linspace(0.5, 2, features))
        self.bias = nn.Parameter(torch.linspace(-1, 1, features))
        self.mean = nn.Parameter(torch.linspace(0.1, 0.3, features), requires_grad=False)
        self.var = nn.Parameter(torch.linspace(0.3, 0.9, features), requires_grad=False)

    def forward(self, x):
        return self.spelling(x, self.weight, self.bias, self.mean, self.var)


def _by_channel(tensor):
    return tensor[None, :, None, None]


def _precomputed(x, weight, bias, mean, var):
    scale = weight / (var + 1e-5).sqrt()
    return x * scale.view(1, -1, 1, 1) + (bias - mean * scale).view(1, -1, 1, 1)


def _in_place(x, weight, bias, mean, var):
    x = (x - mean.view(-1, 1, 1)).div_(var.view(-1, 1, 1).add(1e-5).pow(0.5))
    return x.mul_(weight.view(-1, 1, 1)).add_(bias.view(-1, 1, 1))


def _added_product(x, weight, bias, mean, var):
    scale = _by_channel(weight) * (_by_channel(var) + 1e-5).pow(-0.5)
    return torch.addcmul(_by_channel(bias) - _by_channel(mean) * scale, x, scale)


ARITHMETIC = {
    "rsqrt": lambda x, w, b, m, v: (
        (x - _by_channel(m)) * torch.rsqrt(_by_channel(v) + 1e-5) * _by_channel(w) + _by_channel(b)
    ),
    "reciprocal": lambda x, w, b, m, v: (
        (_by_channel(m) - x).neg() * _by_channel((v + 1e-5).sqrt().reciprocal() * w)
        + _by_channel(b)
    ),
    "precomputed": _precomputed,
    "in place": _in_place,
    "addcmul": _added_product,
}


class InSteps(Frozen):
    def forward(self, x):
        x -= self.mean[:, None, None]
        x = self.weight[:, None, None] * (x / self.var[:, None, None].sqrt())
        return self.bias[:, None, None] + x
