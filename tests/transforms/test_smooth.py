"""[transform.smooth]: channels of similar range in what linear layers read."""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from corpus import missing, torchvision
from plans import net_of, recipe
from shares import every
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.model.scaled_input import ScaledLinear
from qrecipe.transforms import smooth, transform

WIDTH = 16
TOKENS = [
    torch.randn(8, 5, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(10)
]
HELD_OUT = torch.randn(64, 5, WIDTH, generator=torch.Generator().manual_seed(99))
EXECUTORS = ["fx", pytest.param("pt2e", marks=pytest.mark.slow)]

pytestmark = pytest.mark.filterwarnings("ignore:.*QR2(03|07|08|34)")


def _smooth(alpha="0.7", groups='"auto"', base="builtin:x86-static-minmax", head="", rules=""):
    table = f"{rules}[transform.smooth]\nalpha = {alpha}\ngroups = {groups}"
    return recipe(table, base=base, head=head)


def _before(self, x):
    """Norms before the layers: nothing else reads what they give."""
    y = self.norm1(x)
    x = x + self.out(F.softmax(self.q(y) * self.k(y), -1) * self.v(y))
    return x + self.narrow(F.relu(self.wide(self.norm2(x))))


def _after(self, x):
    """Norms after the layers: the residual connection reads what they give, too."""
    x = self.norm1(x + 0)
    x = x + self.out(F.softmax(self.q(x) * self.k(x), -1) * self.v(x))
    x = self.norm2(x)
    return x + self.narrow(F.relu(self.wide(x)))


FLOAT_NORMS = '[rules.module_type]\n"torch.nn.LayerNorm" = "float"\n'


def _block(forward):
    torch.manual_seed(0)
    net = net_of(
        forward,
        **{name: nn.LayerNorm(WIDTH) for name in ("norm1", "norm2")},
        **{name: nn.Linear(WIDTH, WIDTH) for name in ("q", "k", "v", "out")},
        wide=nn.Linear(WIDTH, 4 * WIDTH),
        narrow=nn.Linear(4 * WIDTH, WIDTH),
    )
    with torch.no_grad():
        for norm, readers in ((net.norm1, (net.q, net.k, net.v)), (net.norm2, (net.wide,))):
            norm.weight[3] *= 64
            norm.bias[3] += 64
            for reader in readers:
                reader.weight[:, 3] /= 64
    return net.eval()


def _groups(plan):
    return {group.sites: (group.place, group.at) for group in plan.groups}


def _same_bits(net, changed, batches=TOKENS):
    with torch.no_grad():
        for batch in batches:
            assert torch.equal(changed(batch), net(batch))


# --- what the plan says


def test_a_norm_that_nothing_else_reads_takes_the_scale():
    plan = qrecipe.plan(_block(_before), _smooth(), TOKENS[0])
    groups = _groups(plan)
    assert groups["q", "k", "v"] == ("folded", "norm1")
    assert groups["wide",] == ("folded", "norm2")
    assert groups["narrow",] == ("folded", "wide")  # a linear layer with a ReLU between
    assert groups["out",][0] == "none"
    assert not any(group.exponents for group in plan.groups)
    assert "the weights of norm1" in str(plan)
    assert "group      q, k, v; divided by the weights of norm1" in plan.explain("k")
    assert qrecipe.Plan.from_json(plan.to_json()) == plan


def test_a_norm_with_another_reader_needs_a_product_and_the_plan_says_why():
    plan = qrecipe.plan(_block(_after), _smooth(rules=FLOAT_NORMS), TOKENS[0])
    assert _groups(plan)["q", "k", "v"] == ("product", None)
    assert "a product in float" in str(plan)
    assert "norm1 is read by :add#1 too" in str(plan)


def test_a_tensor_that_is_rounded_before_a_product_stays():
    plan = qrecipe.plan(_block(_after), _smooth(), TOKENS[0])
    assert _groups(plan)["q", "k", "v"] == ("none", None)
    assert "norm1 rounds it before a product could divide it" in str(plan)


def test_what_a_function_gives_is_not_divided_in_its_weights():
    net = net_of(lambda self, x: self.fc(F.linear(x, self.weight)), fc=nn.Linear(WIDTH, WIDTH))
    net.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    plan = qrecipe.plan(net, _smooth(groups='[["fc"]]'), TOKENS[0])
    assert plan.groups[0].reason.startswith(":linear (linear) does not scale with weights")


def test_layers_that_round_nothing_are_no_group():
    rules = '[rules.module_name]\n"wide" = "float"\n'
    plan = qrecipe.plan(_block(_before), _smooth(rules=rules), TOKENS[0])
    assert ("wide",) not in _groups(plan)
    with pytest.warns(qrecipe.QRecipeWarning, match="QR222.*finds no group"):
        qrecipe.plan(nn.Sequential(nn.Conv1d(5, 5, 1)).eval(), _smooth(), TOKENS[0])


def test_a_layer_with_a_shared_weight_is_left_out_and_ends_the_folding():
    net = _block(_before)
    net.k.weight = net.out.weight
    found = {group.sites: group for group in qrecipe.plan(net, _smooth(), TOKENS[0]).groups}
    assert found["k",].reason == "it shares its weight"
    assert found["q", "v"].place == "none"
    assert "norm1 is read by k too" in found["q", "v"].reason


# --- the transformed model


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("forward", [_before, _after])
def test_the_float_function_stays_to_the_bit_and_the_model_as_it_was(forward, executor):
    net = _block(forward)
    before = copy.deepcopy(net.state_dict())
    settings = _smooth(head=f'executor = "{executor}"', rules=FLOAT_NORMS)
    changed = qrecipe.transform(net, settings, TOKENS)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
    _same_bits(net, changed)
    assert any(any(group.exponents) for group in qrecipe.transformation(changed).groups)
    assert not {id(p) for p in changed.parameters()} & {id(p) for p in net.parameters()}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("forward", "base"),
    [
        (_before, "builtin:x86-dynamic"),
        (_after, "builtin:x86-static-minmax"),
        pytest.param(_before, "builtin:x86-static-minmax", marks=pytest.mark.slow),
        pytest.param(_after, "builtin:x86-dynamic", marks=pytest.mark.slow),
    ],
)
def test_a_large_channel_no_longer_takes_the_whole_range(forward, base, executor):
    net, head = _block(forward), f'executor = "{executor}"'
    rules = FLOAT_NORMS if forward is _after and "static" in base else ""
    if rules:
        rules += '[rules.function]\n"torch.add" = "float"\n'
    plain = qrecipe.quantize(net, recipe(rules, base=base, head=head), TOKENS)
    converted = qrecipe.quantize(net, _smooth(base=base, head=head, rules=rules), TOKENS)

    def layers(model):  # without the residual connection, which has outliers of its own
        return model(HELD_OUT) - HELD_OUT if forward is _before else model(HELD_OUT)

    with torch.no_grad():
        expected = layers(net)
        gain = sqnr_db(expected, layers(converted)) - sqnr_db(expected, layers(plain))
    assert gain > (6 if forward is _before else 3)


def test_layers_that_read_one_tensor_share_a_product_which_stays_float():
    settings = _smooth(rules=FLOAT_NORMS)
    changed = qrecipe.transform(_block(_after), settings, TOKENS)
    plan = qrecipe.compile(changed, settings, TOKENS[0]).plan
    products = [site for site in plan if site.op == "smooth"]
    assert "q:smooth" in [site.name for site in products]
    assert not {"k:smooth", "v:smooth"} & {site.name for site in products}
    assert {site.verdict for site in products} == {"float"}
    assert "[transform.smooth]" in plan["q:smooth"].reason
    assert plan["q"].verdict == "quantized"


def test_rules_do_not_count_products():
    rules = FLOAT_NORMS + '[rules.module_name]\n"q" = { qconfig = "int8", expect = 1 }\n'
    net, settings = _block(_after), _smooth(rules=rules)
    assert qrecipe.quantize(net, settings, TOKENS) is not None


def test_products_survive_a_file_and_compare_with_the_original(tmp_path):
    net, settings = _block(_after), _smooth(rules=FLOAT_NORMS)
    converted = qrecipe.quantize(net, settings, TOKENS)
    qrecipe.save_quantized(converted, tmp_path / "net.safetensors")
    changed = qrecipe.transform(net, settings, TOKENS)
    for architecture in (_block(_after), changed):
        loaded = qrecipe.load_quantized(tmp_path / "net.safetensors", architecture)
        assert torch.equal(loaded(HELD_OUT), converted(HELD_OUT))
    for reference in (net, changed):
        compared = qrecipe.compare(reference, loaded, TOKENS[:1])
        assert min(site.weight.sqnr_db for site in compared.sites if site.weight) > 30
    with pytest.raises(qrecipe.ArtifactError, match="QR420"):
        qrecipe.compare(net_of(_after, **dict(_wider().named_children())), loaded, TOKENS[:1])


def _wider():
    net = _block(_after)
    net.wide, net.narrow = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
    return net.eval()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_transformed_model_may_be_quantized_by_a_recipe_without_transforms(executor, tmp_path):
    net, head = _block(_after), f'executor = "{executor}"'
    changed = qrecipe.transform(net, _smooth(head=head, rules=FLOAT_NORMS), TOKENS)
    plain = recipe(FLOAT_NORMS, base="builtin:x86-static-minmax", head=head)
    converted = qrecipe.quantize(changed, plain, TOKENS)
    plan = qrecipe.Plan.from_json(qrecipe.provenance(converted).plan)
    assert plan.groups == qrecipe.transformation(changed).groups
    qrecipe.save_quantized(converted, tmp_path / "net.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "net.safetensors", net)
    assert torch.equal(loaded(HELD_OUT), converted(HELD_OUT))
    reports = [qrecipe.compare(each, loaded, TOKENS[:1]).sites for each in (net, changed)]
    weights = [{site.name: site.weight for site in sites} for sites in reports]
    assert weights[0] == weights[1]
    assert min(each.sqnr_db for each in weights[0].values() if each) > 30


def test_training_starts_from_the_transformed_model():
    net = _block(_after)
    settings = _smooth(head='phase = "qat"', rules=FLOAT_NORMS)
    compiled = qrecipe.compile(net, settings, TOKENS[0], batches=TOKENS)
    prepared = compiled.prepare()
    prepared(TOKENS[0]).square().mean().backward()
    converted = compiled.convert(prepared)
    found = qrecipe.Plan.from_json(qrecipe.provenance(converted).plan)
    assert found.groups == compiled.plan.groups
    assert any(group.is_product for group in found.groups)


def test_a_model_is_transformed_once(monkeypatch):
    net, settings = _block(_after), _smooth(rules=FLOAT_NORMS)
    changed = qrecipe.transform(net, settings, TOKENS)
    first = qrecipe.sensitivity(net, settings, TOKENS)
    monkeypatch.setattr(transform, "transform", None)
    assert qrecipe.sensitivity(changed, settings, TOKENS).sites == first.sites
    assert qrecipe.quantize(changed, settings, TOKENS) is not None


def test_other_settings_start_from_the_model_as_it_was():
    net = _block(_after)
    first = qrecipe.transform(net, _smooth(rules=FLOAT_NORMS), TOKENS)
    assert any(isinstance(module, ScaledLinear) for module in first.modules())
    second = qrecipe.transform(first, _smooth("0.5", rules=FLOAT_NORMS), TOKENS)
    expected = qrecipe.transform(net, _smooth("0.5", rules=FLOAT_NORMS), TOKENS)
    assert qrecipe.transformation(second) == qrecipe.transformation(expected)
    none = qrecipe.transform(first, recipe(base="builtin:x86-static-minmax"), TOKENS)
    assert none.state_dict().keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, none.state_dict()[name])


def test_a_group_without_a_gain_stays_as_it_is():
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)).eval()
    changed = qrecipe.transform(net, _smooth("[0.5, 0.7]"), TOKENS)
    (group,) = qrecipe.transformation(changed).groups
    assert group.alpha is None
    assert not any(group.exponents)


def test_each_group_has_the_alpha_with_the_smallest_error():
    net = _block(_before)
    with torch.no_grad():
        for layer in (net.q, net.k, net.v):
            layer.weight[:, 3] *= 64  # alpha = 0 looks at the weights alone, which are alike
    groups = '[["q", "k", "v"]]'
    for alphas in ("[0.0, 0.7]", "[0.7, 0.0]"):
        changed = qrecipe.transform(net, _smooth(alphas, groups), TOKENS)
        assert [group.alpha for group in qrecipe.transformation(changed).groups] == [0.7]


def test_dead_channels_stay():
    net = _block(_before)
    with torch.no_grad():
        net.norm2.weight[5] = net.norm2.bias[5] = 0
        net.wide.weight[:, 7] = 0
    changed = qrecipe.transform(net, _smooth(groups='[["wide"]]'), TOKENS)
    (group,) = qrecipe.transformation(changed).groups
    assert group.exponents[5] == group.exponents[7] == 0
    assert group.exponents[3] > 0
    assert all(torch.isfinite(p).all() for p in changed.parameters())


def test_a_step_that_changes_the_function_is_an_audit_error(monkeypatch):
    def wrong(view, group, factor):
        with torch.no_grad():
            view.get_submodule(group.sites[0]).weight.mul_(factor)

    monkeypatch.setattr(smooth, "_scale_weights", wrong)
    with pytest.raises(qrecipe.AuditError, match="QR417"):
        qrecipe.transform(_block(_before), _smooth(), TOKENS)


# --- layers that torch computes as a whole, and models without a graph


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_encoder_layer_is_smoothed_inside(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, 2, 32, batch_first=True, norm_first=norm_first, activation="gelu"
    )
    with torch.no_grad():
        layer.norm1.weight[2] *= 50
        layer.norm2.weight[2] *= 50
    net = nn.Sequential(layer).eval()
    with nullcontext() if norm_first else pytest.warns(qrecipe.QRecipeWarning, match="QR222"):
        plan = qrecipe.plan(net, _smooth(), TOKENS[0])
    wanted = ("0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj")
    assert _groups(plan)[wanted] == (("folded", "0.norm1") if norm_first else ("none", None))
    if norm_first:
        changed = qrecipe.transform(net, _smooth(), TOKENS)
        _same_bits(net, changed)
        assert not torch.equal(changed[0].self_attn.in_proj_weight, layer.self_attn.in_proj_weight)
        converted = qrecipe.quantize(net, _smooth(), TOKENS)
        assert qrecipe.compare(net, converted, TOKENS[:1]).sites


class _Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = _block(_before)

    def forward(self, x):
        return self.inside(x) if x.sum() < 1e9 else x


def test_eager_mode_puts_a_product_before_each_layer(tmp_path):
    net, settings = _Untraceable().eval(), _smooth(base="builtin:x86-dynamic")
    plain = qrecipe.quantize(net, "builtin:x86-dynamic", TOKENS[:1])
    converted = qrecipe.quantize(net, settings, TOKENS)
    _same_bits(net, qrecipe.transform(net, settings, TOKENS))
    plan = qrecipe.Plan.from_json(qrecipe.provenance(converted).plan)
    assert plan.executor == "eager"
    assert _groups(plan)["inside.q",] == ("product", None)
    with torch.no_grad():
        expected = net(HELD_OUT) - HELD_OUT
        gained = sqnr_db(expected, converted(HELD_OUT) - HELD_OUT)
        assert gained > sqnr_db(expected, plain(HELD_OUT) - HELD_OUT) + 6
    qrecipe.save_quantized(converted, tmp_path / "net.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "net.safetensors", net)
    assert torch.equal(loaded(HELD_OUT), converted(HELD_OUT))
    assert qrecipe.sensitivity(net, settings, TOKENS[:2]).sites
    compared = qrecipe.compare(net, loaded, TOKENS[:1])
    assert min(site.weight.sqnr_db for site in compared.sites if site.weight) > 30


def test_eager_mode_leaves_layers_alone_that_are_part_of_one_of_torchs():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
            self.last = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            x = self.attention(x, x, x)[0] if x.sum() > -1e9 else x
            return self.last(x)

    net, settings = Attending().eval(), _smooth(base="builtin:x86-dynamic")
    _same_bits(net, qrecipe.transform(net, settings, TOKENS))
    plan = qrecipe.plan(net, settings, TOKENS[0])
    assert plan.executor == "eager"
    places = {site: place for sites, (place, _) in _groups(plan).items() for site in sites}
    assert places.pop("last") == "product"
    assert set(places.values()) == {"none"}
    assert qrecipe.quantize(net, settings, TOKENS) is not None


@pytest.mark.parametrize("shape", [(WIDTH,), (4, WIDTH), (2, 3, 4, WIDTH)])
def test_layers_read_any_number_of_dimensions_by_position_or_keyword(shape):
    norm, last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)
    net = net_of(lambda self, x: self.last(input=self.norm(x)), norm=norm, last=last).eval()
    with torch.no_grad():
        norm.weight[3] *= 64
        last.weight[:, 3] /= 64
    batches = [torch.randn(shape) for _ in range(4)]
    changed = qrecipe.transform(net, _smooth(), batches)
    _same_bits(net, changed, batches)
    (group,) = qrecipe.transformation(changed).groups
    assert group.exponents[3] > 1


# --- recipes


def test_listed_groups_are_taken_as_they_are_and_an_empty_list_switches_them_off():
    net = _block(_before)
    assert _groups(qrecipe.plan(net, _smooth(groups='[["wide"]]'), TOKENS[0])) == {
        ("wide",): ("folded", "norm2")
    }
    some = qrecipe.plan(net, _smooth(groups='[["q", "k"]]'), TOKENS[0])
    assert _groups(some) == {("q", "k"): ("product", None)}
    assert qrecipe.plan(net, _smooth(groups="[]"), TOKENS[0]).groups == ()
    assert qrecipe.compile(net, _smooth(groups="[]"), TOKENS[0]) is not None


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ('[["q", "kk"]]', '"kk" is not a linear layer that can be in a group'),
        ('[["q", "wide"]]', "q, wide do not read the same tensor"),
        ("[[]]", "a group needs a site"),
    ],
)
def test_a_group_that_the_model_does_not_have_is_an_error_at_its_line(groups, message):
    with pytest.raises(qrecipe.PlanError) as caught:
        qrecipe.plan(_block(_before), _smooth(groups=groups), TOKENS[0])
    (finding,) = caught.value.findings
    assert finding.code == "QR341"
    assert message in finding.message
    assert finding.location.line == 6


@pytest.mark.parametrize("alpha", ['"auto"', "[]", "1.5", "[0.5, -1]"])
def test_alpha_is_a_fraction_or_a_list_of_them(alpha):
    with pytest.raises(qrecipe.SchemaError):
        _smooth(alpha)


def test_one_alpha_and_a_list_of_one_are_the_same_recipe():
    assert _smooth("0.7").fingerprint == _smooth("[0.7]").fingerprint
    assert _smooth("0.7").fingerprint != _smooth("0.5").fingerprint
    again = qrecipe.parse_recipe(_smooth("[0.5, 0.7]").to_toml())
    assert again.transform == _smooth("[0.5, 0.7]").transform


@pytest.mark.parametrize("first", every(2, ["smooth", "equalize"]))
def test_channels_are_equalized_before_they_are_smoothed_whatever_the_file_says(first):
    tables = {
        "equalize": '[transform.equalize]\nby = "weights"\n',
        "smooth": '[transform.smooth]\ngroups = [["wide"], ["narrow"]]\n',
    }
    text = "".join(tables.pop(first) for first in (first, *set(tables) - {first}))
    base = "builtin:x86-static-minmax"
    net, both = _block(_before), recipe(text, base=base)
    changed = qrecipe.transform(net, both, TOKENS)
    _same_bits(net, changed)
    record = qrecipe.transformation(changed)
    assert [chain.sites for chain in record.chains] == [("wide", "narrow")]
    equalized = qrecipe.transform(
        net, recipe('[transform.equalize]\nby = "weights"', base=base), TOKENS
    )
    assert record.chains == qrecipe.transformation(equalized).chains
    back = qrecipe.transform(changed, recipe(base=base), TOKENS)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name])
    converted = qrecipe.quantize(net, both, TOKENS)
    compared = qrecipe.compare(net, converted, TOKENS[:1])
    assert min(site.weight.sqnr_db for site in compared.sites if site.weight) > 30


# --- trained encoders


def _encoder():
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples/digits"))
    import digits
    import encoder

    return digits, encoder


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["fx", "pt2e"])
@pytest.mark.parametrize("base", ["builtin:x86-static", "builtin:x86-dynamic"])
def test_a_trained_encoder_with_outlying_channels_gains_six_decibels(base, executor):
    digits, encoder = _encoder()
    net, head = encoder.outlying(encoder.factory()[0]), f'executor = "{executor}"'
    batches, images = digits.calibration(), digits.held_out_digits().images[:200]
    plain = qrecipe.quantize(net, recipe(base=base, head=head), batches)
    converted = qrecipe.quantize(net, _smooth(base=base, head=head), batches)
    with torch.no_grad():
        expected = net(images)
        gained = sqnr_db(expected, converted(images))
        assert gained > sqnr_db(expected, plain(images)) + 6


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("executor", ["fx", "pt2e"])
def test_a_bert_loses_nothing(executor):
    torchvision("models")  # transformers imports it too
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 100}
    config = transformers.BertConfig(num_hidden_layers=2, num_attention_heads=4, **sizes)
    net = transformers.BertModel(config).eval()
    words = [{"input_ids": torch.randint(1, 99, (8, 12))} for _ in range(11)]
    parts = [f"encoder.layer.{at}.{part}" for at in (0, 1) for part in ("intermediate", "output")]
    roots = f"[fx]\nroots = {parts}\n".replace("'", '"') if executor == "fx" else ""
    head = f'executor = "{executor}"'
    plain = qrecipe.quantize(net, recipe(roots, base="builtin:x86-static", head=head), words[1:])
    settings = _smooth(base="builtin:x86-static", head=head, rules=roots)
    converted = qrecipe.quantize(net, settings, words[1:])
    with torch.no_grad():
        expected = net(**words[0])[0]
        lost = sqnr_db(expected, plain(**words[0])[0]) - sqnr_db(expected, converted(**words[0])[0])
    assert lost < 0.5
