"""Models that FX cannot trace and torch.export can: the same sites, and PT2E executes them."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from corpus import missing, torchvision
from nets import UNTRACEABLE
from plans import recipe
from programs import QCONFIGS
from torch import nn
from training import qat_recipe

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import PlanError, QRecipeWarning, TraceError, UnmatchedRuleError

MINMAX = "builtin:x86-static-minmax"


class Unrolled(nn.Module):
    """Steps that no trace can count, unless ``steps`` is int."""

    def __init__(self, steps=lambda size: size):
        super().__init__()
        self.steps = steps
        self.embed = nn.Linear(6, 8)
        self.cells = nn.ModuleList([nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU())])
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout()
        self.head = nn.Linear(16, 3)
        self.alias = self.head

    def forward(self, x, mask=None, scale=1.0):
        h = self.embed(x[:, 0])
        for t in range(self.steps(x.shape[1])):
            h = self.drop(self.cells[1](self.cells[0](h))) + self.embed(x[:, t])
            h = self.norm(h * 0.5)
        y = torch.cat([h, F.hardtanh(h)], -1)
        return {"y": self.alias(y), "h": (h.transpose(0, 1) * scale, h[:, None, 1:-1])}


class Counted(nn.Module):
    """The same in small."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x, mask=None, scale=1.0):
        h = sum(self.body(self.embed(x[:, t])) for t in range(x.shape[1]))
        return {"y": h, "h": (h.transpose(0, 1) * scale,)}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Counted().eval()


@pytest.fixture(scope="module")
def batches():
    torch.manual_seed(1)
    return [torch.randn(4, 2, 6) for _ in range(10)]


def test_the_sites_are_those_of_a_trace(batches):
    model, twin = Unrolled().eval(), Unrolled(int).eval()
    twin.load_state_dict(model.state_dict())
    exported = qrecipe.plan(model, MINMAX, batches[0], executor="pt2e")
    traced = qrecipe.plan(twin, MINMAX, batches[0], executor="pt2e")
    assert exported.sites == traced.sites
    assert [site.name for site in exported if site.name.startswith("embed")] == [
        "embed",
        "embed#1",
        "embed#2",
    ]
    assert exported["alias"].name == "head"
    named = {site.name: site.op for site in exported}
    assert named["cells.1.0#1"] == "Linear+ReLU"
    assert {":getitem", ":add#1", ":cat", ":hardtanh", ":transpose"} <= named.keys()


def test_rules_find_their_sites_and_miss_as_in_a_trace(model, batches):
    rules = '[rules.module_name]\n"body" = { qconfig = "float", expect = 2 }\n'
    plan = qrecipe.plan(model, recipe(rules, base=MINMAX), batches[0], executor="pt2e")
    assert [plan[name].verdict for name in ("body.0", "body.0#1")] == ["float", "float"]
    wrong = '[rules.module_name]\n"body.2" = "float"\n'
    with pytest.raises(UnmatchedRuleError, match=r"body\.0"):
        qrecipe.plan(model, recipe(wrong, base=MINMAX), batches[0], executor="pt2e")


def test_the_error_of_a_trace_proposes_it_where_it_works(model, batches):
    with pytest.raises(TraceError, match=r'or let PT2E .*: executor = "pt2e"'):
        qrecipe.plan(model, MINMAX, batches[0])
    with pytest.raises(TraceError) as raised:  # depends on data
        qrecipe.plan(UNTRACEABLE.model(), MINMAX, UNTRACEABLE.batches(1)[0])
    assert "pt2e" not in str(raised.value)


def test_what_cannot_be_exported_is_an_error_without_torchs_output(capfd):
    with pytest.raises(TraceError, match="QR305 the model cannot be exported"):
        qrecipe.plan(UNTRACEABLE.model(), MINMAX, UNTRACEABLE.batches(1)[0], executor="pt2e")
    assert capfd.readouterr().err == ""


class BySample(nn.Module):
    """Asks for the number of samples as Python does, unless it is given another way."""

    def __init__(self, way):
        super().__init__()
        self.layer, self.way = nn.Linear(6, 4), way

    def forward(self, x):
        return self.way(self.layer, x)


def in_a_loop(layer, x):
    return torch.stack([layer(x[index]) for index in range(x.shape[0])])


def by_size(layer, x):
    return layer(x) if x.shape[0] > 3 else layer(x) * 2


@pytest.mark.parametrize("way", [in_a_loop, by_size])
def test_code_that_depends_on_the_number_of_samples_is_shown_and_what_is_said_helps(way):
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    with pytest.raises(PlanError, match=r"QR306 the program that torch\.export makes ") as raised:
        qrecipe.plan(BySample(way).eval(), MINMAX, x, executor="pt2e")
    (finding,) = raised.value.findings
    assert "such as a loop over the samples of a batch" in finding.hint
    (note,) = finding.notes
    assert note.startswith("without torch.export: the model's own forward (BySample) cannot be")
    assert "x.shape[0]" in note
    assert qrecipe.plan(BySample(lambda layer, x: layer(x)).eval(), MINMAX, x, executor="pt2e")


def test_a_module_that_is_kept_out_stays_whole(model, batches):
    rules = '[fx]\nnon_traceable_module_name = ["body"]'
    plan = qrecipe.plan(model, recipe(rules, base=MINMAX), batches[0], executor="pt2e")
    assert plan["body"].verdict == "float"
    assert not any(site.name.startswith("body.") for site in plan)


def test_it_is_quantized_and_loads_again(model, batches, tmp_path):
    pytest.importorskip("torchao")
    executed = recipe(base=MINMAX, head='executor = "pt2e"')
    converted = qrecipe.quantize(model, executed, batches)
    x = batches[0]
    with torch.no_grad():
        output = converted(x)
        assert output_sqnr_db(model(x), output) > 20
        assert converted(torch.randn(9, 2, 6))["y"].shape == (9, 4)
        with pytest.raises(
            AssertionError, match=r"which has x\.shape\[1\] == 2; compile the model"
        ):
            converted(torch.randn(4, 5, 6))  # more steps than in the example
        qrecipe.save_quantized(converted, tmp_path / "net.safetensors")
        loaded = qrecipe.load_quantized(tmp_path / "net.safetensors", Counted().eval())
        assert torch.equal(loaded(x)["h"][0], output["h"][0])


def test_it_is_trained(model, batches):
    pytest.importorskip("torchao")
    recipe = qat_recipe(base="builtin:arm-static")
    with pytest.raises(TraceError, match=r'or let PT2E .*: executor = "pt2e"'):
        qrecipe.compile(model, recipe, batches[0])
    with pytest.warns(QRecipeWarning, match="QR205 the model's own forward"):
        compiled = qrecipe.compile(model, recipe, batches[0], executor="pt2e")
    prepared = compiled.prepare()
    for x in batches:
        prepared(x)["y"].square().mean().backward()
    converted = compiled.convert(prepared)
    with torch.no_grad():
        assert output_sqnr_db(prepared.eval()(x)["y"], converted(x)["y"]) > 30


@pytest.fixture(scope="module")
def calibrated(model, batches):
    pytest.importorskip("torchao")
    batch = {"x": batches[0], "scale": 2.0}
    compiled = qrecipe.compile(model, MINMAX, batch, executor="pt2e")
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, [{"x": x, "scale": 2.0} for x in batches])
    return compiled, prepared


def test_a_file_takes_the_keywords_of_the_example(batches, calibrated, tmp_path):
    compiled, prepared = calibrated
    converted, batch = compiled.convert(prepared), {"x": batches[0], "scale": 2.0}
    qrecipe.export_pt2(converted, tmp_path / "net.pt2", batch)
    program = torch.export.load(tmp_path / "net.pt2").module()
    with torch.no_grad():
        assert torch.equal(program(**batch)["y"], converted(**batch)["y"])


def test_arguments_that_are_no_tensors_are_those_of_the_example(model, batches, calibrated):
    _, prepared = calibrated
    batch = {"x": batches[0], "scale": 2.0}
    with torch.no_grad():
        assert torch.equal(prepared(**batch)["h"][0], model(**batch)["h"][0])
        assert torch.equal(prepared(batches[0], None, 2.0)["y"], model(**batch)["y"])


MODELS = {
    "bert": ("BertConfig", "BertModel", "words"),
    "t5": ("T5Config", "T5EncoderModel", "words"),
    "vit": ("ViTConfig", "ViTModel", "image"),
    "whisper": ("WhisperConfig", "WhisperModel", "sound"),
}
SETTINGS = {
    "bert": {"intermediate_size": 128, "max_position_embeddings": 32},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    "vit": {"intermediate_size": 128, "image_size": 32, "patch_size": 8},
    "whisper": {
        "d_model": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 128,
        "num_mel_bins": 16,
        "max_source_positions": 20,
        "decoder_layers": 1,
        "decoder_attention_heads": 4,
        "pad_token_id": 0,
    },
}
COMMON = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def example(kind):
    if kind == "image":
        return {"pixel_values": torch.randn(4, 3, 32, 32)}
    if kind == "sound":
        return {"input_features": torch.randn(4, 16, 40)}
    return {
        "input_ids": torch.randint(0, 100, (4, 7)),
        "attention_mask": torch.ones(4, 7, dtype=torch.long),
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize("modes", [("int8",), ("dynamic",), ("only", "dynamic", "int8")])
@pytest.mark.parametrize("name", MODELS)
def test_encoders_of_transformers_are_quantized_by_rules_on_their_own_names(name, modes, tmp_path):
    pytest.importorskip("torchao")
    torchvision("models")  # transformers imports it too
    transformers = pytest.importorskip("transformers")
    config, kind, inputs = MODELS[name]
    common = COMMON if name in ("bert", "vit") else {"vocab_size": 100}

    def make():
        torch.manual_seed(0)
        settings = getattr(transformers, config)(**common, **SETTINGS[name])
        made = getattr(transformers, kind)(settings).eval()
        return made.encoder if name == "whisper" else made

    torch.manual_seed(1)
    model, batches = make(), [example(inputs) for _ in range(10)]
    linear = [path for path, each in model.named_modules() if type(each) is nn.Linear]
    rules = "".join(
        f'"{path}" = "{mode}"\n' for path, mode in zip(linear, cycle(modes), strict=False)
    )
    executed = recipe(
        f'{QCONFIGS}[rules]\nglobal = "float"\n[rules.module_name]\n{rules}',
        base=MINMAX,
        head='executor = "pt2e"',
    )
    converted = qrecipe.quantize(model, executed, batches)
    with torch.no_grad():
        expected, output = model(**batches[0]), converted(**batches[0])
        assert type(output) is type(expected)
        assert output_sqnr_db(expected[0], output[0]) > 25
        qrecipe.save_quantized(converted, tmp_path / "net.safetensors")
        loaded = qrecipe.load_quantized(tmp_path / "net.safetensors", make())
        assert torch.equal(loaded(**batches[0])[0], output[0])
