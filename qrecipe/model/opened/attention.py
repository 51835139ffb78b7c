"""torch's multi-head attention, opened into its four linear layers and what is between them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qrecipe.model.opened.whole import Whole
from qrecipe.model.sharing import linear


class MultiheadAttention(nn.MultiheadAttention):
    """torch's, with ``q_proj``, ``k_proj`` and ``v_proj`` on slices of ``in_proj_weight``."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    attention: ScaledDotProductAttention

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        found = self.attention(
            self.q_proj(query),
            self.k_proj(key),
            self.v_proj(value),
            attn_mask,
            key_padding_mask,
            need_weights,
            average_attn_weights,
            is_causal,
        )
        if need_weights:
            return self.out_proj(found[0]), found[1]
        return self.out_proj(found), None


def open_attention(module: nn.MultiheadAttention) -> None:
    """Turn torch's layer into ours, in place; the tensors stay shared."""
    packed = module.in_proj_weight
    weights = (
        (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        if packed is None
        else packed.chunk(3)
    )
    bias = module.in_proj_bias
    biases = (None, None, None) if bias is None else bias.chunk(3)
    for name in ("in_proj_weight", "in_proj_bias", *(f"{x}_proj_weight" for x in "qkv")):
        delattr(module, name)
    for name, *tensors in zip("qkv", weights, biases, strict=True):
        module.add_module(f"{name}_proj", linear(*tensors))
    module.out_proj = linear(module.out_proj.weight, module.out_proj.bias)  # type: ignore[assignment]
    module.add_module("attention", ScaledDotProductAttention(module))
    module.bias_k = module.bias_v = None
    module.__class__ = MultiheadAttention


class ScaledDotProductAttention(Whole):
    """softmax(q @ k.T / sqrt(E)) @ v in each head of E features, with masks."""

    def __init__(self, owner: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.dropout = owner.num_heads, owner.dropout
        self.batch_first, self.add_zero_attn = owner.batch_first, owner.add_zero_attn
        self.bias_k, self.bias_v = owner.bias_k, owner.bias_v
        self.train(owner.training)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        average_weights: bool,
        is_causal: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Shapes are those of ``nn.MultiheadAttention``, with and without a batch.

        As there, ``is_causal`` says that ``attn_mask`` is the causal mask.
        """
        is_causal = is_causal and key_padding_mask is None and not need_weights
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = self._with_one_more(k, self.bias_k), self._with_one_more(v, self.bias_v)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        mask = None if is_causal else self._mask(attn_mask, key_padding_mask, q, k)
        if not need_weights:
            dropout = self.dropout if self.training else 0.0
            found = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
            return self._joined(found)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, self.dropout, self.training)
        return self._joined(weights @ v), weights.mean(-3) if average_weights else weights

    def _heads(self, x: Tensor) -> Tensor:
        """(..., L, heads * E) -> (..., heads, L, E)"""
        if not self.batch_first:
            x = x.transpose(0, -2)  # without a batch, this changes nothing
        return x.view(*x.shape[:-1], self.num_heads, -1).transpose(-3, -2)

    def _joined(self, x: Tensor) -> Tensor:
        x = x.transpose(-3, -2).flatten(-2)
        return x if self.batch_first else x.transpose(0, -2)

    def _with_one_more(self, x: Tensor, token: Tensor) -> Tensor:
        one = token.view(self.num_heads, 1, -1).expand_as(x[..., :1, :])
        return torch.cat([x, one], -2)

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """What is added to the scores (..., heads, L, S)."""
        if attn_mask is not None and attn_mask.dim() == 3 and q.dim() == 4:
            attn_mask = attn_mask.view(*q.shape[:2], *attn_mask.shape[1:])
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[..., None, None, :]
        masks = [
            _added(F.pad(mask, (0, k.shape[-2] - mask.shape[-1])), q.dtype)
            for mask in (attn_mask, key_padding_mask)
            if mask is not None
        ]
        return sum(masks[1:], masks[0]) if masks else None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
