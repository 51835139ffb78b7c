"""A fake-quant with random rounding during training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.ao.quantization.fake_quantize import FakeQuantize

import qrecipe


@qrecipe.register_fake_quant("stochastic_rounding")
class StochasticRoundingFakeQuantize(FakeQuantize):
    r"""Rounds up with a probability equal to the distance from the integer below.

    In training mode q = floor(x / scale + zero_point + u) with u uniform in [0, 1), clamped to
    quant_min..quant_max: inside the range the expectation of (q - zero_point) * scale is x, so
    weights can accumulate changes that are much smaller than a step. In eval mode it is torch's
    ``FakeQuantize``, which rounds to the nearest, as the converted model does. The gradient passes
    the rounding unchanged where q is in range, and is 0 elsewhere. The random numbers are torch's:
    ``torch.manual_seed`` makes training repeatable.

    Source: Gupta et al., Deep Learning with Limited Numerical Precision, 2015 (the rounding);
    Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013
    (the straight-through estimator).
    """

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803  (torch's own name of the argument)
        """A tensor of the shape of ``X``, on the grid of the quantized values."""
        if self.training and self.fake_quant_enabled[0] == 1:
            self._observe(X)
            # rounding to the nearest after noise of up to half a step is floor(. + u)
            noise = (torch.rand_like(X) - 0.5) * self._along_channels(self.scale, X)
            return self._round(X + noise)
        round_to_nearest: Any = super().forward  # torch leaves it untyped
        out: Tensor = round_to_nearest(X)
        return out

    def _observe(self, x: Tensor) -> None:
        if self.observer_enabled[0] == 0:
            return
        self.activation_post_process(x.detach())
        scale, zero_point = self.calculate_qparams()
        self.scale.resize_(scale.shape).copy_(scale)
        self.zero_point.resize_(zero_point.shape).copy_(zero_point)

    def _round(self, x: Tensor) -> Tensor:
        low, high = self.activation_post_process.quant_min, self.activation_post_process.quant_max
        if self.is_per_channel:
            return torch.fake_quantize_per_channel_affine(
                x, self.scale, self.zero_point, self.ch_axis, low, high
            )
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, low, high)

    def _along_channels(self, value: Tensor, x: Tensor) -> Tensor:
        """A value per channel in a shape that broadcasts against ``x``."""
        if not self.is_per_channel:
            return value
        return value.reshape([-1 if axis == self.ch_axis else 1 for axis in range(x.dim())])
