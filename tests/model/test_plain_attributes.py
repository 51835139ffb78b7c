"""What the code around a quantized part reads of it: numbers, texts and containers stay."""

from __future__ import annotations

import copy

import pytest
import torch
from plans import net_of
from routed import recipe_of_roots
from runs import silent
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import PlanError

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore::qrecipe.QRecipeWarning")


class Info:
    def __init__(self, channels):
        self.channels, self.names = channels, {"stem": (0, 1)}


class Backbone(nn.Module):
    output_stride = 4

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)
        )
        self.feature_info, self.info, self._stages = [{"channels": 8}], Info(8), 1

    def forward(self, x):
        return self.body(x)


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))

    def forward(self, x):
        y = self.backbone(x)
        assert y.isfinite().all()
        assert self.backbone.feature_info[-1]["channels"] == y.shape[1]
        assert self.backbone.info.channels == y.shape[1]
        for _ in range(self.backbone._stages):
            y = self.head(y)
        return nn.functional.interpolate(y, scale_factor=self.backbone.output_stride)


class Listed(nn.Module):
    """In the way of YOLO: each layer says where its input is from."""

    def __init__(self):
        super().__init__()
        layers = [Layer(3, 8), Layer(8, 8), Cat(), nn.Conv2d(16, 4, 1)]
        for index, (layer, source) in enumerate(zip(layers, (-1, -1, [-1, 0], -1), strict=True)):
            layer.i, layer.f, layer.type = index, source, type(layer).__name__
        self.layers, self.save = nn.Sequential(*layers), {0}

    def forward(self, x):
        kept = {}
        for layer in self.layers:
            if isinstance(layer.f, list):
                x = [x if index == -1 else kept[index] for index in layer.f]
            x = layer(x)
            if layer.i in self.save and x.isfinite().all():
                kept[layer.i] = x
        return x


class Layer(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


class Cat(nn.Module):
    def forward(self, xs):
        return torch.cat(xs, 1)


@pytest.mark.parametrize(
    ("kind", "roots"),
    [
        (Segmenter, ("backbone", "head")),
        pytest.param(Listed, ("layers.0", "layers.1"), marks=pytest.mark.slow),
    ],
)
def test_roots_of_which_their_parent_reads_attributes_are_suggested_and_quantized(kind, roots):
    torch.manual_seed(0)
    model = kind().eval()
    recipe = qrecipe.suggest(model, IMAGES)
    assert recipe.fx.roots == roots
    converted = qrecipe.quantize(model, recipe, [IMAGES] * 2, progress=silent)
    for whole in (converted, copy.deepcopy(converted)):
        assert sqnr_db(model(IMAGES), whole(IMAGES)) > 20
        if kind is Segmenter:
            assert vars(whole.backbone.info) == vars(model.backbone.info)


def test_they_are_the_converted_models_own_and_those_of_a_loaded_one_too(tmp_path):
    torch.manual_seed(0)
    model, roots = Segmenter().eval(), recipe_of_roots(["backbone"])
    converted = qrecipe.quantize(model, roots, [IMAGES] * 2, progress=silent)
    file = tmp_path / "model.safetensors"
    qrecipe.save_quantized(converted, file)
    given = Segmenter().eval()
    loaded = qrecipe.load_quantized(file, given)
    assert torch.equal(loaded(IMAGES), converted(IMAGES))
    for made, source in ((converted, model), (loaded, given), (loaded, converted)):
        assert made.backbone.feature_info == source.backbone.feature_info
        assert made.backbone.feature_info is not source.backbone.feature_info
        assert made.backbone.feature_info[0] is not source.backbone.feature_info[0]
        assert made.backbone.info is not source.backbone.info


def test_they_stay_in_training_too():
    model = Segmenter().eval()
    text = recipe_of_roots(["backbone"]).to_toml().replace('phase = "ptq"', 'phase = "qat"')
    compiled = qrecipe.compile(model, qrecipe.parse_recipe(text), IMAGES)
    prepared = compiled.prepare()
    prepared(IMAGES)
    assert compiled.convert(prepared)(IMAGES).shape == model(IMAGES).shape


def test_they_stay_where_modules_are_swapped_one_by_one():
    def forward(self, x):
        for layer in (self.first, self.rnn, self.last):
            x = layer(x)[0] if layer.is_recurrent and x.isfinite().all() else layer(x)
        return x

    model = net_of(forward, first=nn.Linear(6, 8), rnn=nn.LSTM(8, 8), last=nn.Linear(8, 4))
    for layer in model.children():
        layer.is_recurrent = isinstance(layer, nn.LSTM)
    converted = qrecipe.quantize(
        model, "builtin:x86-dynamic", example_inputs=torch.randn(5, 2, 6), progress=silent
    )
    assert converted.rnn.is_recurrent
    assert "_flat_weights_names" not in vars(converted.rnn)


@pytest.mark.parametrize("name", ["weight", "tensor", "method", "module"])
def test_tensors_modules_and_methods_do_not_stay(name):
    backbone = Backbone()
    backbone.tensor = torch.ones(1)
    backbone.module = [nn.Linear(2, 2)]
    backbone.method = backbone.zero_grad
    backbone.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        getattr(self.backbone, name)
        y = self.backbone(x)
        return y if y.sum() > 0 else -y

    with pytest.raises(PlanError, match=f"no attribute '{name}'"):
        qrecipe.plan(net_of(forward, backbone=backbone), recipe_of_roots(["backbone"]), IMAGES)


def test_attributes_inside_a_root_are_not_kept_and_the_cure_names_the_module_that_reads_them():
    """torch's encoder asks its first layer for ``self_attn.batch_first``."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = net_of(
        lambda self, x: self.head(self.encoder(x) if x.isfinite().all() else x),
        encoder=nn.TransformerEncoder(layer, 2),
        head=nn.Linear(8, 2),
    )
    tokens = torch.randn(3, 5, 8)
    with pytest.raises(PlanError, match="'batch_first'") as told:
        qrecipe.plan(model, recipe_of_roots(["encoder.layers.0"]), tokens)
    assert "name the module whose code reads them" in told.value.findings[0].hint
    converted = qrecipe.quantize(model, recipe_of_roots(["encoder"]), [tokens] * 2, progress=silent)
    assert sqnr_db(model(tokens), converted(tokens)) > 20
