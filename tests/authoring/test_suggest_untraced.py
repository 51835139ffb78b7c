"""Suggestions for models that no graph holds as a whole: what works is suggested, and why."""

from __future__ import annotations

import pytest
import torch
from plans import net_of
from runs import silent
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import qrecipe
from qrecipe.errors.findings import PlanError

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Signed(nn.Module):
    """Turns around what is negative: no part of it can be traced."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x)
        return y if y.sum() > 0 else -y


class Answer:
    def __init__(self, value):
        self.value = value


def convolutions():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())


def products(width=8):
    return nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 8))


def some_convolutions_and_no_part_that_traces():
    """13 % of the work is in convolutions."""
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 168), nn.Linear(168, 8)]
    return net_of(
        lambda self, x: self.last(self.first(self.flat(self.conv(x)))),
        **dict(zip(("conv", "flat", "first", "last"), map(Signed, layers), strict=True)),
    ), IMAGE


def mostly_convolutions_and_no_part_that_traces():
    return net_of(
        lambda self, x: self.head(self.conv(x).mean((2, 3))),
        conv=Signed(nn.Conv2d(3, 8, 3)),
        head=Signed(nn.Linear(8, 4)),
    ), IMAGE


def a_change_that_tracing_loses():
    def forward(self, x):
        y = torch.zeros(2, 8, 8, 8)
        y[:] = self.body(x)
        return self.head(y.mean((2, 3)))

    return net_of(forward, body=convolutions(), head=products()), IMAGE


def a_counter_of_calls():
    def forward(self, x):
        self.calls += 1
        return self.body(x)

    model = net_of(forward, body=products())
    model.calls = 0
    return model, torch.randn(2, 8)


def random_numbers_in_a_part():
    noise = net_of(lambda self, x: x + 1e-6 * torch.randn_like(x))
    return net_of(lambda self, x: self.body(self.noise(x)), noise=noise, body=convolutions()), IMAGE


def embeddings_alone():
    def forward(self, ids):
        x = self.words(ids)
        return x if x.sum() > 0 else -x

    return net_of(forward, words=nn.Embedding(20, 16)), torch.randint(0, 20, (2, 5))


def a_result_of_its_own_class():
    def forward(self, x):
        return Answer(self.head(self.body(x).mean((2, 3))))

    return net_of(forward, body=convolutions(), head=products()), IMAGE


def sequences_of_many_lengths():
    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])

    model = net_of(forward, rnn=nn.GRU(8, 16, batch_first=True), head=products(16))
    return model, (torch.randn(3, 6, 8), torch.tensor([6, 4, 1]))


def a_detector():
    def forward(self, images, threshold="low"):
        features = self.body(torch.stack(images))
        scores = self.head(features).flatten(2)
        keep = [image.amax(0) > (0 if threshold == "low" else 1) for image in scores]
        return [{"scores": image[:, kept]} for image, kept in zip(scores, keep, strict=True)]

    head = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    return net_of(forward, body=convolutions(), head=head), ([*IMAGE], "low")


CASES = {
    some_convolutions_and_no_part_that_traces: ("dynamic", ()),
    mostly_convolutions_and_no_part_that_traces: ("dynamic", ()),
    a_change_that_tracing_loses: ("static", ("body", "head")),
    a_counter_of_calls: ("dynamic", ()),
    random_numbers_in_a_part: ("static", ("body",)),
    embeddings_alone: ("dynamic", ()),
    a_result_of_its_own_class: ("static", ("body", "head")),
    sequences_of_many_lengths: ("dynamic", ()),
    a_detector: ("static", ("body", "head")),
}
# another share of convolutions, or another reason, and the same answer
SLOW = {
    mostly_convolutions_and_no_part_that_traces,
    a_counter_of_calls,
    random_numbers_in_a_part,
    a_result_of_its_own_class,
}


@pytest.mark.filterwarnings("ignore::qrecipe.QRecipeWarning")
@pytest.mark.parametrize(
    "case",
    [pytest.param(each, marks=pytest.mark.slow) if each in SLOW else each for each in CASES],
    ids=lambda case: case.__name__,
)
def test_what_works_is_suggested_with_the_reason_and_quantizes(case):
    torch.manual_seed(0)
    scheme, roots = CASES[case]
    model, batch = case()
    recipe = qrecipe.suggest(model, batch)
    assert (recipe.name, recipe.fx.roots) == (f"suggested-{scheme}", roots)
    with pytest.raises(PlanError) as caught:
        qrecipe.plan(model, "builtin:x86-static", batch)
    assert f"because {caught.value.findings[0].message}." in recipe.description
    converted = qrecipe.quantize(model, recipe, [batch] * 2, progress=silent)
    assert any("quantized" in type(module).__module__ for module in converted.modules())


def test_the_share_of_convolutions_in_the_case_of_no_part_that_traces():
    from qrecipe.model.call import Inputs
    from qrecipe.model.work import work_of

    model, batch = some_convolutions_and_no_part_that_traces()
    assert work_of(model, Inputs.from_batch(batch)).convolution_share == pytest.approx(
        0.13, abs=0.01
    )


def test_a_root_with_which_conversion_fails_is_left_out_and_said(monkeypatch):
    from qrecipe.authoring.suggest import suggest
    from qrecipe.errors.findings import AuditError, Finding

    def failing(model, recipe, *args, **kwargs):
        if "head" in recipe.fx.roots:
            raise AuditError(Finding("QR412", "the kernel of head is wrong"))

    monkeypatch.setattr(suggest, "quantize", failing)
    model, batch = a_result_of_its_own_class()
    recipe = qrecipe.suggest(model, batch)
    assert recipe.fx.roots == ("body",)
    assert "Tried without success: static with roots body, head: the kernel of head is wrong." in (
        recipe.description
    )


def test_a_scheme_that_plans_and_does_not_convert_gives_way_to_the_next(monkeypatch):
    from qrecipe.authoring.suggest import suggest
    from qrecipe.errors.findings import AuditError, Finding

    def failing(model, recipe, *args, **kwargs):
        if recipe.name in wrong:
            raise AuditError(Finding("QR411", "the kernel is wrong"))

    monkeypatch.setattr(suggest, "quantize", failing)
    wrong, model = {"suggested-dynamic"}, products().eval()
    recipe = qrecipe.suggest(model, torch.randn(2, 8))
    assert recipe.name == "suggested-static"
    assert "Tried without success: dynamic: the kernel is wrong." in recipe.description
    wrong |= {"suggested-static", "suggested-float16"}
    assert qrecipe.suggest(model, torch.randn(2, 8)).name == "suggested-dynamic"


def counted_by_size(kernel_outside_parts):
    """No trace can count the steps, torch.export can."""

    def forward(self, x):
        for _ in range(x.shape[2] // 4):
            x = self.last(x) if kernel_outside_parts else x + 1
        return self.body(x)

    torch.manual_seed(0)
    last = nn.Conv2d(3, 3, kernel_outside_parts or 1, padding="same")
    return net_of(forward, body=convolutions(), last=last), IMAGE


def test_a_program_is_suggested_where_parts_cover_less_than_half():
    pytest.importorskip("torchao")
    model, batch = counted_by_size(kernel_outside_parts=11)
    recipe = qrecipe.suggest(model, batch)
    assert (recipe.executor, recipe.fx.roots) == ("pt2e", ())
    assert "PT2E executes the program of torch.export, because the model's own" in str(
        recipe.description
    )
    plan = qrecipe.plan(model, recipe, batch)
    assert {"body.0", "last", "last#1"} <= {site.name for site in plan if site.mode == "static"}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [0, 1])
def test_parts_are_suggested_where_they_cover_half(kernel):
    model, batch = counted_by_size(kernel_outside_parts=kernel)
    recipe = qrecipe.suggest(model, batch)
    assert (recipe.executor, recipe.fx.roots) == (None, ("body",))


def test_without_torchao_parts_are_suggested_and_why(monkeypatch):
    monkeypatch.setattr("qrecipe.execution.pt2e.executor.find_spec", lambda name: None)
    model, batch = counted_by_size(kernel_outside_parts=11)
    recipe = qrecipe.suggest(model, batch)
    assert recipe.fx.roots == ("body",)
    assert 'Tried without success: static: executor = "pt2e" needs torchao' in str(
        recipe.description
    )
