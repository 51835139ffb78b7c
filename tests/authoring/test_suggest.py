"""Suggested recipes: they plan without a finding, and say why they are as they are."""

from __future__ import annotations

import warnings

import pytest
import tomli
import torch
from corpus import CORPUS, TORCHVISION, missing
from differential import forget_models, snapshot
from nets import NETS, UNTRACEABLE
from plans import net_of, sites
from routed import Routed
from runs import silent
from shares import every
from torch import nn

import qrecipe
from qrecipe.authoring.suggest.suggest import suggestion
from qrecipe.errors.findings import PlanError, QRecipeWarning, TraceError, UnsupportedError

STATIC = {
    *("residual", "depthwise", "shared_conv", "shared_conv_two_norms", "functional", "shapes"),
    *("squeeze_excite", "decoder", "norms"),
}
DYNAMIC_TORCHVISION = {"convnext_tiny", "swin_t", "swin_v2_t", "vit_b_16"}
ALWAYS = ("squeeze_excite", "shapes")

BY_SIZE = {"QR207", "QR208"}
"""What no recipe can help: the toy nets are so small that int8 may be slower."""


def scheme_of(name):
    if name in TORCHVISION:
        return {"alexnet": "mixed"}.get(
            name, "dynamic" if name in DYNAMIC_TORCHVISION else "static"
        )
    return "mixed" if name == "cnn_lstm" else "static" if name in STATIC else "dynamic"


def _corpus():
    for at, name in enumerate(CORPUS):
        marks = []
        if name in TORCHVISION:
            marks.append(pytest.mark.skipif(missing() is not None, reason=str(missing())))
        if name not in ALWAYS and (name in TORCHVISION or at % 6 != 1):
            marks.append(pytest.mark.slow)
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", list(_corpus()))
def test_the_suggestion_plans_without_a_finding_on_the_corpus(name):
    if name in TORCHVISION:
        forget_models()
    net = CORPUS[name]
    model, batch = net.model(), net.batches(1)[0]
    recipe = qrecipe.suggest(model, batch)
    plan = qrecipe.plan(model, recipe, batch)
    assert plan.findings == ()
    assert {finding.code for finding in plan.warnings} <= BY_SIZE
    assert recipe.name == f"suggested-{scheme_of(name)}"
    modes = {site.mode for site in plan.sites if site.verdict == "quantized"}
    expected = {"static": {"static"}, "dynamic": {"dynamic"}, "mixed": {"static", "dynamic"}}
    assert modes - {"weight_only"} == expected[scheme_of(name)]


def test_weights_and_activations_are_observed_as_the_literature_recommends():
    net = NETS["residual"]
    plan = qrecipe.plan(
        net.model(), qrecipe.suggest(net.model(), net.batches(1)[0]), net.batches(1)[0]
    )
    specs = [site.qconfig for site in plan.sites if site.verdict == "quantized"]
    weights = {spec.weight for spec in specs if spec.weight is not None}
    assert {(w.observer.name, w.dtype, w.qscheme) for w in weights} == {
        ("per_channel_minmax", "int8", "per_channel_symmetric")
    }
    assert {spec.activation.observer.name for spec in specs} == {"moving_average_minmax"}


@pytest.mark.parametrize("name", every(2, ["residual", "tagger", "cnn_lstm"]))
def test_a_suggested_recipe_quantizes(name):
    net = NETS[name]
    recipe = qrecipe.suggest(net.model(), net.batches(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QRecipeWarning)
        converted = qrecipe.quantize(net.model(), recipe, net.batches(10), progress=silent)
    assert qrecipe.provenance(converted).fingerprint == recipe.fingerprint


def test_an_embedding_is_quantized_by_its_weights_alone():
    net = NETS["tagger"]
    model, batch = net.model(), net.batches(1)[0]
    found = sites(qrecipe.plan(model, qrecipe.suggest(model, batch), batch))
    assert found["embedding"].mode == "weight_only"
    assert found["fc"].mode == "dynamic"


def test_layers_that_a_type_rule_could_not_have_are_float_by_name_with_the_reason():
    model = net_of(
        lambda self, x: self.fc(self.good(self.bad(x)[0])[0]),
        bad=nn.LSTM(6, 8, proj_size=6),
        good=nn.LSTM(6, 6),
        fc=nn.Linear(6, 4),
    )
    batch = torch.randn(5, 2, 6)
    plan = qrecipe.plan(model, qrecipe.suggest(model, batch), batch)
    found = sites(plan)
    assert found["bad"].verdict == "float"
    assert found["bad"].rule.key == "bad"
    assert "proj_size" in found["bad"].rule.reason
    assert found["good"].mode == found["fc"].mode == "dynamic"


def test_one_rule_leaves_a_whole_type_without_a_kernel_float():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8)
    ).eval()
    text = suggestion(model, torch.randn(2, 3, 8, 8))
    assert tomli.loads(text)["rules"] == {
        "module_type": {
            "torch.nn.GroupNorm": {
                "qconfig": "float",
                "reason": "x86 has no quantized kernel for GroupNorm",
            }
        }
    }


def test_a_dynamic_recipe_says_why_convolutions_stay_float():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Conv1d(4, 4, 1)).eval()
    rules = tomli.loads(suggestion(model, torch.randn(2, 4, 64)))["rules"]
    assert (
        rules["module_type"]["torch.nn.Conv1d"]["reason"] == "x86 has no dynamic kernel for Conv1d"
    )
    assert rules["global"]["qconfig"] == "float"


def test_a_convolution_that_int8_makes_slower_stays_float():
    slow = nn.ConvTranspose2d(128, 128, 3, 2, 1, 1, groups=128)
    model = nn.Sequential(nn.Conv2d(3, 128, 3), slow, nn.Conv2d(128, 8, 3)).eval()
    batch = torch.randn(2, 3, 8, 8)
    assert "QR207" in {w.code for w in qrecipe.plan(model, "builtin:x86-static", batch).warnings}
    plan = qrecipe.plan(model, qrecipe.suggest(model, batch), batch)
    assert plan.warnings == ()
    assert sites(plan)["1"].verdict == "float"
    assert "slower" in sites(plan)["1"].reason


class LinearAttention(nn.Module):
    """Attention without softmax: what it divides by is a product of its own."""

    def __init__(self, divide):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.qkv = nn.Conv2d(16, 48, 1)
        self.proj = nn.Conv2d(16, 16, 1)
        self.divide = divide

    def forward(self, x):
        x = self.stem(x)
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2).chunk(3, -1)
        q, k = torch.relu(q), torch.relu(k)
        found = q @ (k.transpose(1, 2) @ nn.functional.pad(v, (0, 1), value=1.0))
        found = self.divide(found[..., :-1], found[..., -1:])
        return x + self.proj(found.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize(
    ("divide", "products"),
    [
        (lambda a, b: a / (b + 1e-6), "float"),
        (lambda a, b: torch.div(a, b.clamp(min=1e-6)), "float"),
        pytest.param(lambda a, b: a.true_divide(other=b), "float", marks=pytest.mark.slow),
        (lambda a, b: a * b.reciprocal(), "float"),
        pytest.param(lambda a, b: a * b**-1, "float", marks=pytest.mark.slow),
        (lambda a, b: a * torch.pow(b + 1e-6, exponent=-0.5), "float"),
        (lambda a, b: torch.addcdiv(a, a, b), "float"),
        (lambda a, b: a * b**2, "quantized"),
        (lambda a, b: a / b.norm(), "quantized"),  # which is float, and not small
        pytest.param(lambda a, b: (a + b) / 2.0, "quantized", marks=pytest.mark.slow),
    ],
)
def test_a_product_that_something_is_divided_by_stays_float(divide, products):
    model, batch = LinearAttention(divide).eval(), torch.randn(2, 3, 16, 16)
    plan = qrecipe.plan(model, qrecipe.suggest(model, batch), batch)
    assert {plan[name].verdict for name in (":matmul", ":matmul#1")} == {products}
    assert plan["qkv"].verdict == "quantized"
    assert ("divisor" in (plan[":matmul"].reason or "")) == (products == "float")


class Normed(nn.Module):
    """A LayerNorm of a convolution's result, over its channels."""

    def __init__(self, channels, last):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.LayerNorm(channels)
        self.last = last

    def forward(self, x):
        return self.last(self.norm(self.stem(x).permute(0, 2, 3, 1)))


@pytest.mark.parametrize(
    ("channels", "last", "verdict"),
    [
        (64, nn.Linear(64, 10), "quantized"),
        (96, nn.Linear(96, 10), "quantized"),
        (24, nn.Linear(24, 10), "float"),  # whose int8 kernel computes 32 at once
        (40, nn.Linear(40, 10), "float"),
        (64, nn.GELU(), "float"),  # which would make floats of its integers at once
        (64, nn.Flatten(), "float"),
    ],
)
def test_a_norm_of_integers_stays_float_where_its_int8_kernel_is_slower(channels, last, verdict):
    torch.manual_seed(0)
    model, batch = Normed(channels, last).eval(), torch.randn(2, 3, 16, 16)
    site = qrecipe.plan(model, qrecipe.suggest(model, batch), batch)["norm"]
    assert site.verdict == verdict
    assert (site.reason is not None and "slower" in site.rule.reason) == (verdict == "float")


def test_a_convolutional_model_of_which_only_parts_trace_gets_roots():
    torch.manual_seed(0)
    model, batch = Routed().eval(), torch.randn(4, 3, 8, 8)
    recipe = qrecipe.suggest(model, batch)
    assert recipe.fx.roots == ("backbone", "head")
    assert "outside the roots" in recipe.description
    found = sites(qrecipe.plan(model, recipe, batch))
    assert found.keys() >= {"backbone.conv", "head.fc1", "head.fc2"}


def test_an_untraceable_model_of_linear_layers_needs_no_roots():
    model, batch = UNTRACEABLE.model(), UNTRACEABLE.batches(1)[0]
    recipe = qrecipe.suggest(model, batch)
    assert recipe.fx.roots == ()
    assert "swapped one by one" in recipe.description
    plan = qrecipe.plan(model, recipe, batch)
    assert plan.executor == "eager"
    modes = {name: site.mode for name, site in sites(plan).items()}
    assert modes["head"] == modes["attention.qkv"] == "dynamic"


def test_a_convolutional_model_without_a_part_that_traces_is_an_error():
    def forward(self, x):
        y = self.conv(x)
        return y if y.sum() > 0 else -y

    with pytest.raises(TraceError, match="QR305"):
        qrecipe.suggest(net_of(forward, conv=nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8))


def test_a_model_without_any_kernel_or_with_slow_ones_alone_is_an_error():
    slow = nn.ConvTranspose2d(4, 8, 2, groups=2)
    for layer, batch in ((nn.GELU(), torch.randn(2, 6)), (slow, torch.randn(1, 4, 6, 6))):
        with pytest.raises(UnsupportedError, match="a quantized kernel as fast as float"):
            qrecipe.suggest(nn.Sequential(layer, nn.SiLU()).eval(), batch)


@pytest.mark.parametrize("name", every(2, ["residual", "recurrent", "cnn_lstm"]))
def test_the_callers_model_stays_as_it_was(name):
    net = NETS[name]
    model = net.model()
    before = snapshot(model)
    qrecipe.suggest(model, net.batches(1)[0])
    assert snapshot(model) == before


def test_the_description_tells_the_size_and_the_rule_of_thumb():
    net = NETS["mlp"]
    recipe = qrecipe.suggest(net.model(), net.batches(1)[0])
    assert "over 10 million parameters are more robust" in recipe.description
    assert "this one has 180." in recipe.description


class Patches(nn.Module):
    """A convolution before torch's own encoder."""

    def __init__(self, mask=None):
        super().__init__()
        self.mask = mask
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        layer = nn.TransformerEncoderLayer(16, 4, 256, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 4)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        words = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.encoder(words, self.mask).mean(1))


def suggested_for_patches(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of nested tensors
        return qrecipe.suggest(model, torch.rand(1, 3, 64, 64))


def test_a_transformer_behind_a_convolution_is_opened():
    recipe = suggested_for_patches(Patches().eval())
    assert recipe.name == "suggested-dynamic"
    assert "92% of the multiplications with weights are in quantized operations." in (
        recipe.description
    )


def test_a_transformer_behind_a_convolution_is_no_convolutional_net_and_says_what_stays_float():
    # torch's fast path takes any number but 0 in a mask for "leave out", and so it is not opened
    recipe = suggested_for_patches(Patches(torch.rand(64, 64)).eval())
    assert recipe.name == "suggested-dynamic"
    # 4 layers of (4 * 16 * 16 + 2 * 16 * 256) and a convolution of 3 * 64 * 16 for each token
    assert "matrix products, such as those of linear and recurrent layers, are 92%" in (
        recipe.description
    )
    assert "Most of the work stays float: less than 1% of the mult" in recipe.description
    assert "Left float: TransformerEncoder 92%, Conv2d 8%." in recipe.description
    assert "write them with nn.Linear" in recipe.description


def test_a_convolution_with_weight_norm_is_said_to_stay_float():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
    model = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    said = qrecipe.suggest(model, torch.rand(1, 3, 8, 8)).description
    assert "Most of the work stays float: 7% of" in said  # 8 * 2 of 8 * 2 + 8 * 3 * 9
    assert "Left float: ParametrizedConv2d 93%." in said
    assert "has no kernel: remove them first" in said


class Routing(nn.Module):
    """A root that is small, and single layers outside of it."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        self.neck = nn.Conv2d(4, 10, 1)
        self.head = nn.Conv2d(10, 10, 1)

    def forward(self, x):
        x = self.backbone(x)
        return self.head(self.neck(x)) if x.mean() > -1 else x


def test_what_lies_outside_of_the_roots_is_named_with_its_share():
    torch.manual_seed(0)
    recipe = qrecipe.suggest(Routing().eval(), torch.rand(1, 3, 8, 8))
    assert recipe.fx.roots == ("backbone",)
    said = recipe.description
    assert "1 operation inside the roots: 1 quantized, 0 passthrough, 0 float." in said
    assert "Most of the work stays float: 8% of" in said  # 12 of 12 + 40 + 100
    assert "head (outside the roots) 66%, neck (outside the roots) 26%." in said
    assert "wrap a single layer in nn.Sequential" in said


def test_functions_of_a_model_that_is_not_traced_are_named_with_their_share():
    weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return self.fc(x) if x.sum() > 1e9 else self.fc(x @ weight)

    said = qrecipe.suggest(net_of(forward, fc=nn.Linear(6, 6)), torch.rand(2, 6)).description
    assert "50% of the multiplications with weights are in quantized operations." in said
    assert "Left float: the model itself (its functions) 50%." in said


def test_where_all_of_the_work_is_quantized_nothing_is_left_to_name():
    net = NETS["residual"]
    said = qrecipe.suggest(net.model(), net.batches(1)[0]).description
    assert "\n100% of the multiplications with weights are in quantized operations.\n" in said
    assert "Left float" not in said


def test_a_model_of_embeddings_alone_multiplies_nothing():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten()).eval()
    said = qrecipe.suggest(model, torch.randint(0, 10, (2, 3))).description
    assert "nothing in this model multiplies with weights" in said
    assert "Only the weights of embeddings are quantized" in said
    assert "%" not in said
    assert "2 operations: 1 quantized, 0 passthrough, 1 float." in said


def picky(self, given):
    return self.fc(given["x"]) if given["x"].sum() > 0 else self.fc(-given["x"])


@pytest.mark.parametrize(
    ("forward", "inputs"),
    [
        (lambda self, x: self.fc(x), "x"),
        (lambda self, x: self.fc(x), None),
        (lambda self, x: self.fc(x), torch.rand(2, 5)),
        (picky, ({"y": torch.rand(1, 3)},)),
        (picky, torch.rand(1, 3)),
        (picky, 3),
    ],
)
def test_inputs_that_the_model_cannot_take_are_told_as_plan_tells_them(forward, inputs):
    model = net_of(forward, fc=nn.Linear(3, 3))
    for call in (
        lambda: qrecipe.suggest(model, inputs),
        lambda: qrecipe.plan(model, "builtin:x86-dynamic", inputs),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of torch, of such an index
            with pytest.raises(PlanError, match="QR307 the model does not accept"):
                call()


@pytest.mark.parametrize("name", ["residual", "mlp", "tagger"])
def test_a_model_that_is_quantized_already_is_said_to_be(name):
    net = NETS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QRecipeWarning)
        recipe = qrecipe.suggest(net.model(), net.batches(1)[0])
        converted = qrecipe.quantize(net.model(), recipe, net.batches(10), progress=silent)
    for model in (converted, nn.Sequential(converted)):
        with pytest.raises(UnsupportedError, match="QR335 this model is already quantized"):
            qrecipe.suggest(model, net.batches(1)[0])


def test_a_model_with_quantized_functions_alone_is_said_to_be_quantized():
    model = net_of(lambda self, x: torch.add(x, x))
    batches = [torch.rand(1, 3, 8, 8) for _ in range(10)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QRecipeWarning)
        converted = qrecipe.quantize(model, "builtin:x86-static", batches, progress=silent)
    with pytest.raises(UnsupportedError, match="already quantized: by the recipe"):
        qrecipe.suggest(converted, batches[0])


# --- the number of batches


def observers(plan):
    specs = [site.qconfig.activation for site in plan.sites if site.mode == "static"]
    return {spec.observer.name for spec in specs}


@pytest.mark.parametrize("name", ["residual", pytest.param("cnn_lstm", marks=pytest.mark.slow)])
def test_few_batches_get_ranges_that_do_not_depend_on_their_order(name):
    net = NETS[name]
    model, batch = net.model(), net.batches(1)[0]
    few = qrecipe.suggest(model, batch, num_batches=99)
    assert observers(qrecipe.plan(model, few, batch)) == {"minmax"}
    assert "99 batches" in few.description
    for count in (None, 100):
        many = qrecipe.suggest(model, batch, num_batches=count)
        assert observers(qrecipe.plan(model, many, batch)) == {"moving_average_minmax"}
        assert "about 100" in many.description


def test_a_dynamic_suggestion_is_the_same_for_any_number_of_batches():
    net = NETS["mlp"]
    given = net.model(), net.batches(1)[0]
    assert suggestion(*given, 8) == suggestion(*given)


@pytest.mark.parametrize("base", ["x86-static", "x86-vnni-static", "arm-static"])
def test_each_static_recipe_has_one_beside_it_that_differs_in_the_observer_alone(base):
    recipe, other = (qrecipe.load_recipe(f"builtin:{name}") for name in (base, f"{base}-minmax"))
    one, two = (tomli.loads(each.to_toml()) for each in (recipe, other))
    assert two["tensor"]["activation"].pop("observer") == "minmax"
    assert one["tensor"]["activation"].pop("observer") == "moving_average_minmax"
    for table in (one, two):
        table.pop("name"), table.pop("description")
    assert one == two
