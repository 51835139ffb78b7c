"""A recipe that quantizes nothing, or next to nothing, of what it asks for says so."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from command_line import model_folder, run
from plans import net_of, recipe, verdicts
from runs import silent
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

import qrecipe
from qrecipe.errors.findings import QRecipeWarning

DYNAMIC = "builtin:x86-dynamic"
EMBEDDINGS = "builtin:embedding-weight-only"
WORDS = torch.zeros(2, 5, 16)
ROWS = torch.zeros(2, 16)
IMAGE = torch.zeros(1, 3, 8, 8)


def watched(layer):
    """A layer that is not opened: its hooks see what torch calls."""
    layer.register_forward_hook(lambda module, args, output: None)
    return layer


def encoder(*around):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(watched(nn.TransformerEncoder(layer, 1)), *around).eval()


def normed(*more):
    return nn.Sequential(
        weight_norm(nn.Linear(16, 16)), nn.ReLU(), weight_norm(nn.Linear(16, 4)), *more
    ).eval()


def attention():
    return net_of(
        lambda self, x: self.head(self.attend(x, x, x)[0]),
        attend=watched(nn.MultiheadAttention(16, 2, batch_first=True)),
        head=nn.Linear(16, 1),
    )


def cnn():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()


def recurrent():
    return net_of(
        lambda self, x: self.head(self.lstm(x)[0]), lstm=nn.LSTM(16, 16), head=nn.Linear(16, 1)
    )


def hooked():
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1)).eval()
    net[0].register_forward_hook(lambda module, args, output: None)
    return net


CASES = {
    "torch's encoder": (encoder, DYNAMIC, WORDS, "nothing", "TransformerEncoder"),
    "a small head": (
        lambda: encoder(nn.Linear(16, 2)),
        DYNAMIC,
        WORDS,
        "only",
        "TransformerEncoder.*hooks",
    ),
    "attention": (attention, DYNAMIC, WORDS, "only", "MultiheadAttention"),
    "parametrized": (normed, DYNAMIC, ROWS, "nothing", "remove_parametrizations"),
    "a plain head": (lambda: normed(nn.Linear(4, 2)), DYNAMIC, ROWS, "only", "parametrized"),
    "no such layer": (cnn, EMBEDDINGS, IMAGE, "nothing", 'the model has no operation for .*"'),
    "no linear layer": (cnn, DYNAMIC, IMAGE, "nothing", "qrecipe suggest"),
    "no static kernel": (recurrent, "builtin:x86-static", WORDS, "only", "can be dynamic"),
    "hooks": (hooked, "builtin:x86-static", ROWS, "only", "it has hooks"),
    "float by name": (
        cnn,
        recipe('[rules.module_type]\n"torch.nn.Conv2d" = "float"'),
        IMAGE,
        "nothing",
        "other rules leave everything float",
    ),
}


@pytest.mark.filterwarnings("ignore:QR230")
@pytest.mark.parametrize("case", CASES)
def test_what_is_next_to_nothing_is_a_warning_with_the_reason(case):
    make, a_recipe, x, how_much, reason = CASES[case]
    with pytest.warns(QRecipeWarning, match=f"(?s)QR221 {how_much}.*{reason}"):
        plan = qrecipe.plan(make(), a_recipe, x)
    assert plan.warnings[0].code == "QR221"
    assert "QR221" in str(plan)


def test_the_share_counts_multiplications_of_what_rules_ask_for():
    """32 x 32 of two layers beside 2 x 32: the convolution is none of this recipe's business."""
    net = net_of(
        lambda self, x: self.small(self.plain(self.big(self.conv(x).flatten(1)))),
        conv=nn.Conv2d(3, 4, 7, padding=3, stride=8),
        big=weight_norm(nn.Linear(4, 32)),
        plain=weight_norm(nn.Linear(32, 32)),
        small=nn.Linear(32, 2),
    )
    with pytest.warns(QRecipeWarning, match=r"QR221 only 5\.3% of the multiplications"):
        qrecipe.plan(net, DYNAMIC, IMAGE)  # 64 of 64 + 1024 + 128


SOUND = {
    "every rule says float": (cnn, recipe('[rules]\nglobal = "float"'), IMAGE),
    "a tenth": (lambda: normed(nn.Linear(4, 64)), DYNAMIC, ROWS),
    "embeddings beside an encoder": (
        lambda: nn.Sequential(nn.Embedding(9, 16), *encoder()).eval(),
        EMBEDDINGS,
        torch.zeros(2, 5, dtype=torch.long),
    ),
    "a convolution that a dynamic recipe leaves": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).eval(),
        DYNAMIC,
        IMAGE,
    ),
    "accepted": (cnn, recipe('[lint]\nignore = ["QR221"]', base=EMBEDDINGS), IMAGE),
}


@pytest.mark.parametrize("case", SOUND)
def test_what_the_author_meant_is_no_warning(case):
    make, a_recipe, x = SOUND[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error", QRecipeWarning)
        warnings.filterwarnings("ignore", ".*QR207")  # the nets are small
        plan = qrecipe.plan(make(), a_recipe, x)
    assert "QR221" not in {finding.code for finding in plan.warnings}


def test_a_ranking_of_next_to_nothing_says_so():
    batches = [torch.rand(2, 16) for _ in range(10)]
    net = normed(nn.Linear(4, 2))
    with pytest.warns(QRecipeWarning, match="(?s)QR221 only .*parametrized"):
        ranking = qrecipe.sensitivity(net, DYNAMIC, batches, progress=silent)
    assert [site.name for site in ranking.sites] == ["3"]
    accepted = recipe('[lint]\nignore = ["QR221"]', base=DYNAMIC)
    with warnings.catch_warnings():
        warnings.simplefilter("error", QRecipeWarning)
        warnings.filterwarnings("ignore", ".*QR207")
        qrecipe.sensitivity(net, accepted, batches, progress=silent)


def test_quantize_warns_where_nobody_prints_the_plan():
    with pytest.warns(QRecipeWarning, match="QR221"):
        qrecipe.quantize(encoder(), DYNAMIC, [WORDS], progress=silent)
    with pytest.warns(QRecipeWarning, match="QR221"):
        qrecipe.compile(encoder(), DYNAMIC, WORDS)


def test_a_filter_makes_it_an_error_before_anything_is_calibrated():
    batches = iter([WORDS, WORDS])
    warnings.filterwarnings("error", "QR221", QRecipeWarning)
    with pytest.raises(QRecipeWarning, match="QR221"):
        qrecipe.quantize(encoder(), DYNAMIC, batches, progress=silent)
    assert next(batches, None) is not None


def test_removing_the_parametrizations_mends_it_as_the_warning_says():
    net = normed()
    for layer in (net[0], net[2]):
        remove_parametrizations(layer, "weight")
    assert verdicts(qrecipe.plan(net, DYNAMIC, ROWS))["0"] == "quantized"


def test_a_module_of_ones_own_with_linear_layers_mends_it_as_the_warning_says():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v))

    plan = qrecipe.plan(Attention().eval(), DYNAMIC, WORDS)
    assert {name for name, verdict in verdicts(plan).items() if verdict == "quantized"} == {
        "qkv",
        "out",
    }


@pytest.mark.parametrize(
    "name",
    [
        "torch.nn.utils.parametrize.ParametrizedLinear",
        "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
    ],
)
def test_classes_of_torchs_own_making_may_be_named(name):
    assert recipe(f'[rules.module_type]\n"{name}" = "float"').rules


FACTORY = """

def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1)).eval()
    model[0].register_forward_hook(lambda module, args, output: None)
    return model, torch.zeros(2, 5, 16)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for path in model_folder(tmp_path, monkeypatch):
        with (path / "net_of_tests.py").open("a") as file:
            file.write(FACTORY)
        yield path


ENCODER = ("--model", "net_of_tests.py:encoder")


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_the_commands_show_it_and_fail_on_it_with_strict(command, folder):
    told = run(command, DYNAMIC, *ENCODER)
    assert told.exit_code == 0
    assert told.stdout.count("QR221 nothing is quantized") == 1
    strict = run(command, DYNAMIC, *ENCODER, "--strict", *OUT[command])
    assert strict.exit_code == 1
    assert strict.stderr.count("error: QR221") == 1
    assert "0 quantized" in strict.stdout
    assert "QR221" not in strict.stdout
    assert not (folder / "q.safetensors").exists()


OUT = {"plan": (), "quantize": ("--out", "q.safetensors")}


def test_the_commands_document_holds_it(folder):
    found = json.loads(run("plan", DYNAMIC, *ENCODER, "--json").stdout)
    assert "QR221" in {each["code"] for each in found["warnings"]}


def test_strict_holds_what_is_accepted_and_any_other_warning(folder):
    (folder / "own.toml").write_text(
        f'format = 1\nextends = "{DYNAMIC}"\nlint.ignore = ["QR221", "QR209"]\n'
    )
    assert run("plan", "own.toml", *ENCODER, "--strict").exit_code == 0
    found = run("plan", "builtin:x86-static", "--model", "net_of_tests.py:factory", "--strict")
    assert found.exit_code == 1
    assert "error: QR208" in found.stderr
