"""Masks that take the range of int8 sums (QR237)."""

import warnings

import pytest
import torch
from libraries import WRITTEN
from plans import net_of, recipe
from torch import nn

import qrecipe

pytestmark = pytest.mark.filterwarnings("ignore:.*QR237", "ignore:.*QR203")

X, KEPT = torch.randn(2, 6, 16), torch.ones(2, 6)
CAUSAL = torch.full((6, 6), -1e4).triu(1)


def _net(mask, **buffers):
    """Scores with a mask; ``mask(self, scores, kept)`` gives the sum."""
    net = net_of(
        lambda self, x, kept: mask(
            self, torch.matmul(self.q(x), self.k(x).transpose(1, 2)), kept[:, None]
        ).softmax(-1),
        q=nn.Linear(16, 16),
        k=nn.Linear(16, 16),
    )
    for name, value in buffers.items():
        net.register_buffer(name, value)
    return net.eval()


def _warned(net):
    warnings = qrecipe.plan(net, recipe(), (X, KEPT)).warnings
    return [finding for finding in warnings if finding.code == "QR237"]


@pytest.mark.parametrize(
    "mask",
    [
        lambda self, s, kept: s + (1.0 - kept) * -10000.0,
        lambda self, s, kept: torch.finfo(torch.float32).min * (1.0 - kept) + s,
        lambda self, s, kept: s + torch.zeros_like(kept).masked_fill(kept == 0, -1e9),
        lambda self, s, kept: s + torch.where(kept > 0, 0.0, -1e4),
        lambda self, s, kept: torch.add(s, self.causal),
        lambda self, s, kept: s + self.causal[None, :6, :6],
        lambda self, s, kept: s + (self.causal + (1.0 - kept) * -1.0),  # both sums
    ],
)
def test_masks_are_found_however_they_are_made(mask):
    (finding,) = _warned(_net(mask, causal=CAUSAL))
    assert ":add" in finding.message


@pytest.mark.parametrize(
    "mask",
    [
        lambda self, s, kept: s.masked_fill(kept == 0, -1e4),  # float, and no sum
        lambda self, s, kept: s + (1.0 - kept) * -100.0,
        lambda self, s, kept: s + self.bias,
        lambda self, s, kept: s * -1e4 + s,  # no constant enters the sum
    ],
)
def test_other_sums_are_no_masks(mask):
    assert _warned(_net(mask, bias=torch.randn(6, 6))) == []


class Attention(nn.Module):
    """An attention that is given its mask."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x, mask):
        scores = torch.matmul(self.q(x), self.k(x).transpose(1, 2)) + mask
        return torch.matmul(scores.softmax(-1), self.v(x))


PADDED = torch.zeros(2, 1, 6).masked_fill(torch.arange(6) > 3, -1e4)


@pytest.mark.parametrize("executor", ["fx", "pt2e"])
@pytest.mark.parametrize("mask", [CAUSAL, PADDED, PADDED.sign() * 3e38])
def test_a_mask_among_the_example_inputs_is_found(mask, executor):
    net = Attention().eval()
    with pytest.warns(qrecipe.QRecipeWarning, match="QR237.*1 int8 sum: :add"):
        plan = qrecipe.plan(net, recipe(), (X, mask), executor=executor)
    assert plan[":add"].verdict == "quantized"


@pytest.mark.parametrize(
    "mask", [torch.zeros(2, 1, 6), CAUSAL / 100, CAUSAL.abs(), torch.randn(2, 6, 6) * 1e4]
)
def test_other_inputs_are_no_masks(mask):
    plan = qrecipe.plan(Attention().eval(), recipe(), (X, mask))
    assert "QR237" not in [each.code for each in plan.warnings]


def test_a_mask_that_is_computed_from_an_input_is_found_by_its_numbers():
    net = _net(lambda self, s, kept: s + (kept + 1e-9).log() * self.far, far=torch.full((1,), 1e3))
    padded = KEPT.clone()
    padded[:, 4:] = 0
    assert _warned(net) == []
    plan = qrecipe.plan(net, recipe(), (X, padded))
    assert "QR237" in [each.code for each in plan.warnings]


def test_quantizing_tells_of_a_mask_in_the_first_batch_and_suggest_leaves_its_sum_float():
    net = Attention().eval()
    batches = [(torch.randn(2, 6, 16), PADDED) for _ in range(10)]
    with pytest.warns(qrecipe.QRecipeWarning) as caught:
        qrecipe.quantize(net, recipe(), batches, progress=False)
    assert sum("QR237" in str(each.message) for each in caught) == 1
    hybrid = net_of(
        lambda self, x, mask: self.rest(self.conv(x).transpose(1, 2), mask),
        conv=nn.Conv1d(256, 16, 3, padding=1),
        rest=net,
    ).eval()
    inputs = torch.randn(2, 256, 6), PADDED
    with pytest.warns(qrecipe.QRecipeWarning, match="QR237"):
        suggested = qrecipe.suggest(hybrid, inputs)
    assert qrecipe.plan(hybrid, suggested, inputs)["rest:add"].verdict == "float"


@pytest.mark.parametrize(
    ("phase", "executor"),
    [
        ("ptq", "pt2e"),
        ("qat", "fx"),
        pytest.param("ptq", "fx", marks=pytest.mark.slow),
        pytest.param("qat", "pt2e", marks=pytest.mark.slow),
    ],
)
def test_calibration_tells_of_a_mask_that_only_later_batches_have(phase, executor):
    net = Attention().eval()
    head = f'executor = "{executor}"\nphase = "{phase}"'
    batches = [(torch.randn(2, 6, 16), mask) for mask in (torch.zeros(2, 1, 6), *[PADDED] * 9)]
    for table, expected in (("", 1), ('[rules.module_name]\n":add" = "float"', 0)):
        settings = recipe(table, head=head, base="builtin:x86-static-minmax")
        prepared = qrecipe.compile(net, settings, batches[0]).prepare()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            qrecipe.calibrate(prepared, batches, progress=False)
        told = [str(each.message) for each in caught if "QR237" in str(each.message)]
        assert len(told) == expected
        assert all(":add" in each for each in told)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["kept tokens", "added to the scores"])
def test_the_masks_of_a_bert_with_eager_attention_are_found(mask):
    bert = WRITTEN["bert"]
    if bert.missing():
        pytest.skip(bert.missing())
    net = bert.model()
    net.set_attn_implementation("eager")
    ids = torch.randint(0, 50, (2, 8))
    kept = (torch.arange(8) < torch.tensor([[8], [5]])).long()
    if mask == "added to the scores":
        kept = (1.0 - kept[:, None, None].float().expand(2, 1, 8, 8)) * torch.finfo().min
    inputs = {"input_ids": ids, "attention_mask": kept}
    plan = qrecipe.plan(net, recipe(), inputs, executor="pt2e")
    (finding,) = (each for each in plan.warnings if each.code == "QR237")
    assert "3 int8 sums" in finding.message
    assert "attention.self:add" in finding.message


def test_the_advice_helps_and_silences():
    net = _net(lambda self, s, kept: s + self.causal, causal=CAUSAL)
    (finding,) = _warned(net)
    assert '":add" = "float"' in finding.hint
    advised = recipe('[rules.module_name]\n":add" = "float"')
    plan = qrecipe.plan(net, advised, (X, KEPT))
    assert "QR237" not in [each.code for each in plan.warnings]
    batches, errors = [(torch.randn(2, 6, 16), KEPT) for _ in range(10)], []
    for each in (recipe(), advised):
        converted = qrecipe.quantize(net, each, batches, progress=False)
        errors.append(float((converted(X, KEPT) - net(X, KEPT)).detach().abs().max()))
    assert errors[1] < errors[0] / 3
