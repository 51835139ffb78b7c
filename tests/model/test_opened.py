"""Layers that hold layers are opened, with the same outputs, or left whole with the reason."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from plans import named, net_of, recipe, sites, verdicts
from shares import every
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.model.call import Inputs
from qrecipe.model.opened.opening import Opening, opened_at, opening_of
from qrecipe.model.trace_proof import difference
from qrecipe.recipe.schema import FxTable

L, S, N, E, HEADS = 3, 4, 2, 8, 2
LATER = torch.ones(L, S, dtype=torch.bool).triu(1)
PADDED = torch.tensor([[False] * S, [False] * (S - 1) + [True]])


def blocked(mask):
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


def opening(model, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of nested tensors, and masks of two dtypes
        return opening_of(model.eval(), Inputs(args, kwargs), FxTable())


def whole(model, *args, **kwargs):
    return dict(opening(model, *args, **kwargs).whole)


MASKS = {
    "none": {},
    "float": {"attn_mask": torch.randn(L, S)},
    "bool": {"attn_mask": LATER},
    "by head": {"attn_mask": torch.randn(N * HEADS, L, S)},
    "padding": {"key_padding_mask": PADDED},
    "float padding": {"key_padding_mask": blocked(PADDED)},
    "both": {"attn_mask": LATER, "key_padding_mask": PADDED},
    "causal": {"attn_mask": blocked(LATER), "is_causal": True},
}
KINDS = {
    "plain": {},
    "bias_k": {"add_bias_kv": True},
    "zero": {"add_zero_attn": True},
    "kdim": {"kdim": 6, "vdim": 10},
    "no bias": {"bias": False},
}
CASES = list(itertools.product(KINDS, MASKS, (True, False), (True, False)))


@pytest.mark.parametrize("case", every(10, CASES))
def test_attention_computes_the_same(case):
    kind, mask, batch_first, need_weights = case
    layer = nn.MultiheadAttention(E, HEADS, batch_first=batch_first, **KINDS[kind])
    shapes = ((L, E), (S, layer.kdim), (S, layer.vdim))
    tensors = [torch.randn(N, *shape) for shape in shapes]
    if not batch_first:
        tensors = [x.transpose(0, 1).contiguous() for x in tensors]
    settings = {**MASKS[mask], "need_weights": need_weights}
    assert opening(layer, *tensors, **settings).paths == ("",)
    assert opening(layer, *tensors, **settings, average_attn_weights=False).paths == ("",)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_without_a_batch_and_to_itself_computes_the_same(batch_first):
    layer = nn.MultiheadAttention(E, HEADS, batch_first=batch_first)
    x, mask = torch.randn(S, E), torch.randn(HEADS, S, S)
    assert whole(layer, x, x, x, attn_mask=mask, key_padding_mask=PADDED[1].float()) == {}
    assert whole(layer, *[torch.randn(S, N, E)] * 3) == {}


def test_what_is_opened_shares_its_memory_with_the_callers_model_and_leaves_it_alone():
    model = nn.TransformerEncoderLayer(E, HEADS, 16, batch_first=True).eval()
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    found = opened_at(model, opening(model, torch.randn(N, S, E)).paths)
    q = found.self_attn.q_proj.weight
    assert q.data_ptr() == model.self_attn.in_proj_weight.data_ptr()
    assert type(model) is nn.TransformerEncoderLayer
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == before


ENCODERS = {
    "fast path": ({"batch_first": True}, {}),
    "slow path": ({}, {}),
    "padding": ({"batch_first": True}, {"src_key_padding_mask": PADDED}),
    "padding between": (
        {"batch_first": True},
        {"src_key_padding_mask": torch.tensor([[False] * S, [False, True, False, True]])},
    ),
    "padding, slow path": ({}, {"src_key_padding_mask": PADDED}),
    "norm first, gelu": ({"norm_first": True, "activation": "gelu"}, {}),
    "a module": ({"activation": nn.SiLU(), "batch_first": True}, {}),
    "causal": ({"batch_first": True}, {"mask": blocked(torch.ones(S, S).triu(1) > 0)}),
    "no bias": ({"bias": False, "batch_first": True}, {}),
}


@pytest.mark.parametrize("case", ENCODERS)
def test_encoders_compute_the_same(case):
    settings, given = ENCODERS[case]
    layer = nn.TransformerEncoderLayer(E, HEADS, 16, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(E))
    x = torch.randn(N, S, E) if settings.get("batch_first") else torch.randn(S, N, E)
    found = opening(model, x, **given)
    assert found == Opening(
        ("", "layers.0", "layers.0.self_attn", "layers.1", "layers.1.self_attn"), {}
    )


def transformer(**settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return nn.Transformer(E, HEADS, 1, 1, 16, **settings).eval()


class Scaled(nn.MultiheadAttention):
    def forward(self, query, key, value, **kwargs):
        attended, weights = super().forward(query * 2, key, value, **kwargs)
        return attended / 2, weights


class OwnBlocks(nn.TransformerEncoderLayer):
    """Each of its blocks does something other than torch's."""

    def _ff_block(self, x):
        return 2 * super()._ff_block(x)

    def _sa_block(self, x, *args, **kwargs):
        return super()._sa_block(x, *args, **kwargs) / 2


class WithoutMasks(nn.TransformerEncoder):
    def forward(self, src, mask=None, **kwargs):
        return super().forward(src) + 1


OWN_CLASSES = {
    "attention": lambda: net_of(
        lambda self, x: self.own(x, x, x)[0], own=Scaled(E, HEADS, batch_first=True)
    ),
    # with another activation, torch's fast path would not call them
    "blocks": lambda: OwnBlocks(E, HEADS, 16, batch_first=True, activation=F.silu),
    "blocks in an encoder": lambda: nn.TransformerEncoder(
        OwnBlocks(E, HEADS, 16, batch_first=True, norm_first=True, activation=F.silu),
        num_layers=1,
        enable_nested_tensor=False,
    ),
    "encoder": lambda: WithoutMasks(encoder_layer(), 1),
}


@pytest.mark.parametrize("case", every(2, OWN_CLASSES))
def test_a_subclass_with_code_of_its_own_is_opened_if_that_still_runs(case, tmp_path):
    torch.manual_seed(0)
    model = OWN_CLASSES[case]().eval()
    assert not whole(model, MEMORY)
    plan = qrecipe.plan(model, recipe(), MEMORY)
    assert {site.verdict for site in plan if site.op == "Linear"} == {"quantized"}
    converted = qrecipe.quantize(model, recipe(), [MEMORY] * 10)
    assert output_sqnr_db(model(MEMORY), converted(MEMORY)) > 25
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", model)
    assert torch.equal(loaded(MEMORY), converted(MEMORY))


MEMORY = torch.randn(N, S, E)
WANTED = torch.randn(N, L, E)
TRANSFORMERS = {
    "plain": {},
    "masks": {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(L),
        "memory_mask": torch.randn(L, S),
    },
    "padding": {
        "src_key_padding_mask": PADDED,
        "memory_key_padding_mask": PADDED,
        "tgt_key_padding_mask": PADDED[:, 1:],
    },
}


@pytest.mark.parametrize("case", TRANSFORMERS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_transformers_compute_the_same(case, batch_first):
    src, tgt = (x if batch_first else x.transpose(0, 1) for x in (MEMORY, WANTED))
    found = opening(transformer(batch_first=batch_first), src, tgt, **TRANSFORMERS[case])
    assert not found.whole
    assert found.paths[0] == ""


def test_they_run_with_other_sizes_than_those_they_were_opened_with():
    model = transformer(batch_first=True)
    found = opened_at(model, opening(model, MEMORY, WANTED).paths)
    src, tgt = torch.randn(5, 7, E), torch.randn(5, 2, E)
    with torch.no_grad():
        assert difference(model(src, tgt), found(src, tgt)) is None


# --- left whole, and said


class ReadsWeights(nn.TransformerEncoderLayer):
    """Asks for the weights that an opened layer holds in another form."""

    def forward(self, src, *args, **kwargs):
        return super().forward(src * self.self_attn.in_proj_weight.dim() / 2, *args, **kwargs)


class Named(nn.TransformerEncoderLayer):
    """A class of the caller's without code of its own."""


def encoder_layer(kind=nn.TransformerEncoderLayer):
    return kind(E, HEADS, 16, batch_first=True).eval()


def hooked():
    layer = encoder_layer()
    layer.register_forward_hook(lambda module, args, output: None)
    return layer


LEFT = {
    "hooks": (hooked, (), "it has hooks"),
    # torch's fast path blocks whatever is not 0 in a mask, and its slow path adds the numbers
    "a mask of numbers": (
        encoder_layer,
        (torch.randn(S, S),),
        "opened, it would compute",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_whole_says_why_in_the_plan(case):
    make, masks, reason = LEFT[case]
    layer = make()
    model = net_of(forward_of(masks), layer=layer, head=nn.Linear(E, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qrecipe.QRecipeWarning)
        plan = qrecipe.plan(model, recipe(), (MEMORY, *masks))
    found = sites(plan)["layer"]
    assert found.verdict == "float"
    if not found.rule.is_float:
        assert reason in found.reason
    assert reason in whole(layer, MEMORY, *masks)[""]


def test_code_of_its_own_that_does_not_run_in_an_opened_layer_is_the_reason():
    found = whole(encoder_layer(ReadsWeights), MEMORY)
    assert "opened, it does not run: 'MultiheadAttention' object has no attribute" in found[""]


def forward_of(masks):
    if masks:
        return lambda self, x, mask: self.head(self.layer(x, mask))
    return lambda self, x: self.head(self.layer(x))


class Nesting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = encoder_layer(), nn.Linear(E, 2)

    def forward(self, x, is_token):
        nested = torch._nested_tensor_from_mask(x, is_token)
        return self.head(self.layer(nested).to_padded_tensor(0.0))


@pytest.mark.slow
def test_what_takes_nested_tensors_is_left_to_torch():
    model, batch = Nesting().eval(), (MEMORY, ~PADDED)
    found = sites(qrecipe.plan(model, recipe(), batch))
    assert "opened, it does not run" in found["layer"].reason
    assert found["head"].verdict == "quantized"
    converted = qrecipe.quantize(model, recipe(), [batch] * 10)
    with torch.no_grad():
        assert torch.allclose(model(*batch), converted(*batch), atol=0.1)


def test_a_layer_whose_activation_cannot_be_traced_is_left_whole():
    layer = nn.TransformerEncoderLayer(
        E, HEADS, 16, batch_first=True, activation=lambda x: x if x.sum() > 1e9 else F.relu(x)
    )
    model = nn.Sequential(layer, nn.Linear(E, 2)).eval()
    found = sites(qrecipe.plan(model, recipe(), MEMORY))
    assert found["0"].op == "TransformerEncoderLayer"
    assert "it stays one operation: " in found["0"].reason
    assert "cannot be traced" in found["0"].reason
    assert found["1"].verdict == "quantized"


def test_a_recipe_may_leave_it_whole():
    model = nn.Sequential(encoder_layer(), nn.Linear(E, 2)).eval()
    for key in ("name = ['0']", "class = ['torch.nn.modules.transformer.TransformerEncoderLayer']"):
        kept = recipe(f"[fx]\nnon_traceable_module_{key}")
        assert verdicts(qrecipe.plan(model, kept, MEMORY)) == {"0": "float", "1": "quantized"}


class CallsTheFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.held = nn.Linear(E, E), nn.MultiheadAttention(E, HEADS)

    def forward(self, x):
        x, held = self.fc(x), self.held
        inside = (held.in_proj_weight, held.in_proj_bias, None, None, False, 0.0)
        outside = (held.out_proj.weight, held.out_proj.bias, False)
        return F.multi_head_attention_forward(x, x, x, E, HEADS, *inside, *outside)[0]


def test_the_function_is_not_opened_and_says_so():
    found = sites(qrecipe.plan(CallsTheFunction().eval(), recipe(), torch.randn(S, N, E)))
    assert "only nn.MultiheadAttention is opened" in found[":multi_head_attention_forward"].reason


# --- names and rules

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"]
LINEAR = [*ATTENTION, "linear1", "linear2"]


def test_every_linear_layer_inside_is_a_site_and_quantized():
    plan = qrecipe.plan(encoder_layer(), recipe(), MEMORY)
    assert [site.name for site in plan.sites if site.op.startswith("Linear")] == LINEAR
    assert all(sites(plan)[name].verdict == "quantized" for name in LINEAR)
    assert sites(plan)["self_attn.attention"].verdict == "float"


def test_rules_for_a_layer_cover_what_is_inside_whatever_its_class_is():
    own = f"{Named.__module__}.{Named.__qualname__}"
    rules = {
        "[rules.module_name]\nself_attn = {qconfig = 'float', expect = 5}": ATTENTION,
        "[rules.module_name]\n'**.v_proj' = 'float'": ["self_attn.v_proj"],
        "[rules.module_type]\n'torch.nn.MultiheadAttention' = 'float'": ATTENTION,
        f"[rules.module_type]\n'{own}' = 'float'": LINEAR,
    }
    for text, left in rules.items():
        found = verdicts(qrecipe.plan(encoder_layer(Named), recipe(text), MEMORY))
        assert [name for name in LINEAR if found[name] == "float"] == left, text
    with pytest.raises(qrecipe.UnmatchedRuleError, match=r"self_attn\.q_proj"):
        qrecipe.plan(encoder_layer(), named(self_attn__q_pro="float"), MEMORY)
