"""What an error proposes for a model that cannot be traced lets it be traced."""

from __future__ import annotations

import re

import pytest
import torch
from plans import net_of, recipe, verdicts
from runs import silent
from torch import nn

import qrecipe
from qrecipe.errors.findings import PlanError, TraceError

_PROPOSED = re.compile(r"\[fx\] (roots|non_traceable_module_name) = (\[[^\]]*\])")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x, mask=None, past=None):
        if past is not None and past[0] is not None:
            x = torch.cat([past[0], x], 1)
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = q @ k.transpose(1, 2)
        if mask is not None:
            weights = weights + mask
        return self.out(weights.softmax(-1) @ v), weights


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x, mask=None, **unused):
        x = x + self.attention(x, mask)[0]
        return x + self.mlp(x)


class Embeddings(nn.Module):
    """Without inputs it traces: then it takes the other branch."""

    def __init__(self):
        super().__init__()
        self.words, self.norm = nn.Embedding(50, 16), nn.LayerNorm(16)
        self.positions = nn.Sequential(nn.Embedding(32, 16))
        self.register_buffer("steps", torch.arange(32)[None])

    def forward(self, ids=None, embeds=None):
        if ids is not None and ids.min() < 0:
            raise ValueError
        shape = ids.shape if ids is not None else embeds.shape[:-1]
        x = self.words(ids) if embeds is None else embeds
        steps = self.steps[:, : int(shape[1])].expand(shape[0], -1)
        return self.norm(x + self.positions(steps))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x, mask=None):
        if mask is not None and mask.min() < -1e9:
            raise ValueError
        for index, layer in enumerate(self.layers):
            x = layer(x, mask=mask, index=index)
        return x


class Language(nn.Module):
    """In the way of BERT: its parts take keywords, or look at values."""

    def __init__(self):
        super().__init__()
        self.embeddings, self.encoder = Embeddings(), Encoder()
        self.pooler = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 2)

    def forward(self, ids, mask=None):
        if mask is not None and mask.sum() == 0:
            raise ValueError
        bias = None if mask is None else (1 - mask[:, None].float()) * -100.0
        x = self.encoder(self.embeddings(ids=ids), mask=bias)
        return {"logits": self.head(self.pooler(x[:, 0]))}


def words(count=4):
    return {"ids": torch.randint(1, 49, (count, 8)), "mask": torch.ones(count, 8).long()}


LAYERS = [f"encoder.layers.{i}.{part}" for i in (0, 1) for part in ("attention", "mlp")]


def proposals(model, fx, inputs):
    with pytest.raises(TraceError, match="QR305") as caught:
        qrecipe.plan(model, recipe(f"[fx]\n{fx}"), inputs)
    return _PROPOSED.findall(str(caught.value))


@pytest.mark.filterwarnings("ignore:QR20[1348]")
@pytest.mark.parametrize(
    "fx",
    [
        "",
        'roots = ["encoder"]',
        pytest.param('roots = ["embeddings", "encoder"]', marks=pytest.mark.slow),
        'roots = ["encoder.layers.0"]',
    ],
)
def test_the_roots_that_are_proposed_quantize_at_the_first_try(fx):
    torch.manual_seed(0)
    model = Language().eval()
    (key, value), *_ = proposals(model, fx, words())
    assert key == "roots"
    followed = recipe(f"[fx]\n{key} = {value}", base="builtin:x86-static")
    converted = qrecipe.quantize(model, followed, [words() for _ in range(10)], progress=silent)
    assert converted(**words(2))["logits"].shape == (2, 2)
    assert set(LAYERS[:2]) <= set(re.findall('"([^"]*)"', value))


def test_parts_that_trace_without_their_inputs_alone_are_not_proposed():
    ((_, value),) = proposals(Language().eval(), "", words())
    assert '"embeddings"' not in value
    assert '"encoder.layers.0"' not in value


class Gate(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def gated():
    return net_of(
        lambda self, x: self.last(self.second(self.body(self.first(x)))),
        first=Gate(),
        body=nn.Linear(6, 6),
        second=nn.Sequential(Gate(), nn.ReLU()),
        last=nn.Linear(6, 2),
    )


@pytest.mark.parametrize("fx", ["", 'non_traceable_module_name = ["second.0"]'])
def test_all_modules_that_have_to_be_left_out_are_proposed_at_once_with_those_that_are(fx):
    x = torch.randn(2, 6)
    ((key, value),) = proposals(gated(), fx, x)
    assert key == "non_traceable_module_name"
    assert sorted(re.findall('"([^"]*)"', value)) == ["first", "second.0"]
    plan = qrecipe.plan(gated(), recipe(f"[fx]\n{key} = {value}"), x)
    assert verdicts(plan)["body"] == "quantized"


class Deciding(nn.Module):
    """Holds the layers of a model, and cannot be traced itself."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers if x.sum() > 0 else ():
            x = layer(x)
        return x


def test_a_part_with_most_of_the_weights_is_not_to_be_left_float_where_its_parts_can_be_traced():
    def deciding(*layers):
        parts = {"body": Deciding(*layers), "last": nn.Linear(6, 6)}
        return net_of(lambda self, x: self.last(self.body(x)), **parts)

    x = torch.ones(2, 6)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3)]
    ((key, value),) = proposals(deciding(*blocks), "", x)
    assert (key, value.count("body.layers")) == ("roots", 3)
    whole = [nn.Linear(6, 6) for _ in range(3)]
    ((key, value),) = proposals(deciding(*whole), "", x)
    assert (key, value) == ("non_traceable_module_name", '["body"]')


def test_code_around_a_part_that_looks_into_it_keeps_it_from_being_proposed():
    model = net_of(
        lambda self, x: self.other(self.part(x)) * self.part[0].weight.sum() if x.sum() > 0 else x,
        part=nn.Sequential(nn.Linear(6, 6)),
        other=nn.Sequential(nn.Linear(6, 6)),
    )
    x = torch.ones(2, 6)
    ((_, value),) = proposals(model, "", x)
    qrecipe.plan(model, recipe(f"[fx]\nroots = {value}"), x)


def test_where_nothing_can_be_proposed_the_line_is_to_be_rewritten():
    model = net_of(lambda self, x: self.fc(x) if x.sum() > 0 else x, fc=nn.Linear(6, 6))
    with pytest.raises(TraceError, match="rewrite this line"):
        qrecipe.plan(model, recipe(), torch.ones(2, 6))


class OwnBlock(nn.TransformerEncoderLayer):
    """The fast path does not call its block, so it cannot be opened."""

    def _sa_block(self, *args, **kwargs):
        return super()._sa_block(*args, **kwargs) * 2


def test_torchs_own_encoder_as_the_model_is_no_line_to_rewrite():
    layer = OwnBlock(16, 2, 32, batch_first=True)
    x = torch.linspace(-1, 1, 160).sin().reshape(2, 5, 16)
    for a_recipe in ("builtin:x86-static", "builtin:x86-dynamic"):
        with pytest.raises(TraceError, match="torch runs it as one operation"):
            qrecipe.plan(nn.TransformerEncoder(layer, 1).eval(), a_recipe, x)


def test_a_model_that_cannot_take_its_inputs_is_not_called_untraceable():
    with pytest.raises(PlanError, match="QR307 the model does not accept the example inputs"):
        qrecipe.plan(gated(), recipe(), torch.ones(2, 7))


class Hiding(nn.Module):
    def __init__(self, hidden, key):
        super().__init__()
        self.hidden, self.key, self.head = hidden, key, nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.hidden[self.key](x))


@pytest.mark.parametrize(
    ("hidden", "key", "cure"),
    [
        (lambda: [nn.Linear(6, 6)], 0, nn.ModuleList),
        (lambda: (nn.Linear(6, 6),), 0, nn.ModuleList),
        (lambda: {"a": nn.Linear(6, 6)}, "a", nn.ModuleDict),
    ],
)
def test_modules_in_a_plain_container_are_told_to_be_put_into_one_of_torchs(hidden, key, cure):
    x = torch.zeros(2, 6)
    with pytest.raises(TraceError, match="hidden is a plain") as caught:
        qrecipe.plan(Hiding(hidden(), key).eval(), recipe(), x)
    assert f"make it a torch.nn.{cure.__name__}" in caught.value.findings[0].hint
    untraced = qrecipe.plan(Hiding(hidden(), key).eval(), "builtin:x86-dynamic", x)
    (told,) = [finding for finding in untraced.warnings if finding.code == "QR210"]
    assert f"make it a torch.nn.{cure.__name__}" in told.notes[0]
    plan = qrecipe.plan(Hiding(cure(hidden()), key).eval(), recipe(), x)
    assert set(verdicts(plan).values()) == {"quantized"}
