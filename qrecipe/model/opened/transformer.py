"""torch's transformer layers as the layers that they hold, without their fast path.

Attributes and arguments are torch's; so is what a mask means.
"""

from __future__ import annotations

from torch import Tensor, nn

from qrecipe.model.opened.whole import Whole


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        masks = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), *masks)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, *masks))
        normed: Tensor = self.norm2(x + self._ff_block(x))
        return normed


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """Its own forward has no fast path."""


class TransformerEncoder(nn.TransformerEncoder):
    padding: ZeroPadding

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        for layer in self.layers:
            src = layer(
                src,
                src_mask=mask,
                src_key_padding_mask=src_key_padding_mask,
                is_causal=is_causal is True,
            )
        nests = getattr(self, "use_nested_tensor", False)  # older pickles lack it
        if nests and mask is None and src_key_padding_mask is not None:
            src = self.padding(src, src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


class TransformerDecoder(nn.TransformerDecoder):
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        for layer in self.layers:
            tgt = layer(
                tgt,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=tgt_is_causal is True,
                memory_is_causal=memory_is_causal,
            )
        return tgt if self.norm is None else self.norm(tgt)


class Transformer(nn.Transformer):
    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        memory = self.encoder(
            src,
            mask=src_mask,
            src_key_padding_mask=src_key_padding_mask,
            is_causal=src_is_causal,
        )
        decoded: Tensor = self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )
        return decoded


def open_encoder(module: nn.TransformerEncoder) -> None:
    """Turn torch's encoder into ours, in place."""
    padding = ZeroPadding(getattr(module, "mask_check", True))
    module.add_module("padding", padding.train(module.training))
    module.__class__ = TransformerEncoder


class ZeroPadding(Whole):
    """Zeros at padded positions (N, L), as torch leaves them there in eval mode.

    torch packs sequences into a nested tensor, if all padding is at their ends.
    """

    def __init__(self, mask_check: bool) -> None:
        super().__init__()
        self.mask_check = mask_check

    def forward(self, x: Tensor, key_padding_mask: Tensor) -> Tensor:
        if self.training or x.dim() != 3:
            return x
        is_padding = key_padding_mask != 0
        if self.mask_check:
            is_padding = is_padding & (is_padding[:, 1:] >= is_padding[:, :-1]).all()
        return x.masked_fill(is_padding.unsqueeze(-1), 0.0)
