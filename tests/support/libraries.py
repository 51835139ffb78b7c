"""Architectures as other libraries write them, with random weights: timm, transformers, torch.

`TIMM`, `TRANSFORMERS` and `OTHERS` map a name to a `Written`; `transformers` makes models of any
size. Their libraries are imported when a model is built; `missing()` says which is not installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from corpus import torchvision
from detector import Detector
from torch import Tensor, nn

_WARMING_BATCHES = 6
_WARMING_SIZE = 8


@dataclass(frozen=True)
class Written:
    """An architecture of ``library``; ``batch`` makes a batch of a given size."""

    library: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Any]

    def missing(self) -> str | None:
        """Why the model cannot be built here, None if it can."""
        if importlib.util.find_spec(self.library) is None:
            return f"{self.library} is not installed: pip install -e '.[models]'"
        return None

    def model(self) -> nn.Module:
        """The model in eval mode, with BatchNorm statistics of random inputs."""
        torch.manual_seed(1)
        model = self.build().eval()
        _wake(model)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train()
            norm.momentum = None  # the plain average
            if norm.bias is not None:
                nn.init.ones_(norm.bias)  # keeps most ReLUs open: see corpus.py
        if norms:
            with torch.no_grad():
                for _ in range(_WARMING_BATCHES):
                    call(model, self.batch(_WARMING_SIZE))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        return model.eval()

    def batches(self, count: int = 10, size: int = 2) -> list[Any]:
        torch.manual_seed(2)
        return [self.batch(size) for _ in range(count)]


def call(model: nn.Module, batch: Any) -> Any:
    """The output for a batch of positional inputs, or of inputs by keyword."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _wake(model: nn.Module) -> None:
    """Give weight to what starts at nothing: zero gains, a layer scale of one millionth."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            last = name.rpartition(".")[2]
            if last in {"gamma", "layer_scale", "layer_scale_1", "layer_scale_2"}:
                parameter.fill_(0.5)
            elif last == "weight" and not parameter.any():
                parameter.normal_(mean=1 if parameter.dim() == 1 else 0, std=0.05)


def _images(px: int) -> Callable[[int], Tensor]:
    return lambda size: torch.randn(size, 3, px, px)


def _timm(name: str, px: int = 128, **arguments: Any) -> Written:
    def build() -> nn.Module:
        torchvision("ops")
        model: nn.Module = importlib.import_module("timm").create_model(
            name, num_classes=10, **arguments
        )
        return model

    return Written("timm", build, _images(px))


_SIZED = {"img_size": 128}

TIMM: dict[str, Written] = {
    **{
        name: _timm(name)
        for name in (
            *("convnext_atto", "convnextv2_atto", "densenet121", "dla46_c", "edgenext_xx_small"),
            *("efficientnet_b0", "efficientvit_b0", "fastvit_t8", "fbnetc_100", "ghostnet_100"),
            *("hardcorenas_a", "lcnet_050", "mobilenetv3_small_100", "mobilenetv4_conv_small"),
            *("mobilevit_xxs", "poolformer_s12", "pvt_v2_b0", "regnety_002", "repvgg_a0"),
            *("resnet18d", "rexnet_100", "semnasnet_075", "tf_efficientnet_lite0"),
            *("tf_efficientnetv2_b0", "tf_mixnet_s", "tinynet_e", "xcit_nano_12_p16_224"),
        )
    },
    **{
        name: _timm(name, **_SIZED)
        for name in (
            *("deit_tiny_patch16_224", "levit_128s", "resmlp_12_224"),
            "swin_tiny_patch4_window7_224",
        )
    },
}
"""At 128 pixels, and 10 classes."""


@dataclass(frozen=True)
class _Settings:
    """What makes a small model of transformers: names of classes, and settings by keyword."""

    config: str
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> nn.Module:
        torchvision("ops")
        library = importlib.import_module("transformers")
        config = getattr(library, self.config)(**self.settings)
        built = getattr(library, self.model)(config)
        model: nn.Module = getattr(built, "encoder", built) if "Whisper" in self.model else built
        return model


@dataclass(frozen=True)
class Size:
    """How wide and deep transformers are, and the texts, images and sounds that they read."""

    features: int
    inner: int
    heads: int
    layers: int
    words: int
    tokens: int
    px: int
    patch: int
    mels: int
    frames: int

    def widths(self) -> dict[str, int]:
        return {
            "hidden_size": self.features,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
        }

    def text(self, size: int) -> dict[str, Tensor]:
        ids = torch.randint(0, self.words, (size, self.tokens))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def images(self, size: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(size, 3, self.px, self.px)}

    def sound(self, size: int) -> dict[str, Tensor]:
        return {"input_features": torch.randn(size, self.mels, self.frames)}

    def embedded(self, size: int) -> Tensor:
        return torch.randn(size, self.tokens, self.features)


SMALL = Size(128, 512, 4, 3, words=1000, tokens=32, px=64, patch=8, mels=40, frames=200)


def transformers(size: Size) -> dict[str, Written]:
    """Models of transformers and of torch.nn, by name."""

    def written(batch: Callable[[int], Any], name: str, model: str, **settings: Any) -> Written:
        return Written(
            "transformers", _Settings(f"{name}Config", f"{name}{model}", settings), batch
        )

    text = {**size.widths(), "vocab_size": size.words}
    vision = {**size.widths(), "image_size": size.px, "patch_size": size.patch}
    narrow = {"embedding_size": size.features // 2}
    return {
        "albert": written(size.text, "Albert", "Model", **text, **narrow),
        "bert": written(size.text, "Bert", "Model", **text),
        "distilbert": written(
            *(size.text, "DistilBert", "Model"),
            dim=size.features,
            n_layers=size.layers,
            n_heads=size.heads,
            hidden_dim=size.inner,
            vocab_size=size.words,
        ),
        "electra": written(size.text, "Electra", "Model", **text, **narrow),
        "gpt2": written(
            *(size.text, "GPT2", "Model"),
            n_embd=size.features,
            n_layer=size.layers,
            n_head=size.heads,
            vocab_size=size.words,
            use_cache=False,
        ),
        "roberta": written(size.text, "Roberta", "Model", **text, pad_token_id=0),
        "t5_encoder": written(
            *(size.text, "T5", "EncoderModel"),
            d_model=size.features,
            d_kv=size.features // size.heads,
            d_ff=size.inner,
            num_layers=size.layers,
            num_heads=size.heads,
            vocab_size=size.words,
        ),
        "vit": written(size.images, "ViT", "Model", **vision),
        "deit": written(size.images, "DeiT", "Model", **vision),
        "yolos": written(
            *(size.images, "Yolos", "ForObjectDetection"),
            **{**vision, "image_size": [size.px, size.px]},
            num_detection_tokens=10,
        ),
        "whisper_encoder": written(
            *(size.sound, "Whisper", "Model"),
            d_model=size.features,
            encoder_layers=size.layers,
            encoder_attention_heads=size.heads,
            decoder_layers=1,
            decoder_attention_heads=size.heads,
            encoder_ffn_dim=size.inner,
            num_mel_bins=size.mels,
            max_source_positions=size.frames // 2,
            vocab_size=size.words,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        "torch.nn.Transformer": Written(
            "torch",
            lambda: nn.Transformer(
                *(size.features, size.heads, size.layers, size.layers, size.inner),
                batch_first=True,
            ),
            lambda count: (size.embedded(count), size.embedded(count)[:, : size.tokens // 2]),
        ),
        "torch.nn.TransformerEncoder": Written(
            "torch",
            lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(size.features, size.heads, size.inner, batch_first=True),
                num_layers=size.layers,
            ),
            size.embedded,
        ),
    }


TRANSFORMERS = transformers(SMALL)
"""Three layers of 128 features, 4 heads; 32 tokens, 64 pixels or 200 frames."""


class _Up(nn.Module):
    """Twice the size, joined with what was seen at that size on the way down."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, 2)
        self.conv = _double(2 * channels, channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        high, wide = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
        x = F.pad(x, [wide // 2, wide - wide // 2, high // 2, high - high // 2])
        result: Tensor = self.conv(torch.cat([skip, x], dim=1))
        return result


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        conv = nn.Conv2d(width, outputs, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Images (N, 3, H, W) to 2 classes a pixel, four sizes, 16 to 128 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _double(3, 16)
        self.down = nn.ModuleList(_double(16 * 2**k, 32 * 2**k) for k in range(3))
        self.up = nn.ModuleList(_Up(16 * 2**k) for k in reversed(range(3)))
        self.last = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.first(x)]
        for stage in self.down:
            seen.append(stage(F.max_pool2d(seen[-1], 2)))
        x = seen.pop()
        for stage in self.up:
            x = stage(x, seen.pop())
        result: Tensor = self.last(x)
        return result


OTHERS: dict[str, Written] = {
    "unet": Written("torch", UNet, _images(64)),
    "detector": Written("torch", Detector, _images(64)),
}

WRITTEN: dict[str, Written] = {**TIMM, **TRANSFORMERS, **OTHERS}
