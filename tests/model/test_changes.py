"""Changes in place reach all who share the memory, in the quantized model too."""

import operator
from collections.abc import Callable

import plain_torch as plain
import pytest
import torch
import torch.nn.functional as F
from plans import net_of, recipe, sites
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import PlanError

WHOLE = slice(None)
DIAGONAL = torch.eye(6, dtype=torch.bool)
INDEX = torch.tensor([0, 2])


def item(key, value):
    def change(x):
        x[key] = value

    return change


def scaled_item(x):
    x[:, :2] *= 3


def raised_item(x):
    x[..., 0] += 1


def copied_item(x):
    x[:, :2] = 2 * x[:, 2:4]


def item_twice(x):
    y = x[:, :4]
    x[:, 0] = 0.0
    y[:, 1] = x[:, 0] + 1


def part_of_a_chunk(x):
    a, _ = x.chunk(2, 1)
    a.relu_()


def part_of_a_split(x):
    _, b = torch.split(x, [3, 5], dim=1)
    F.relu(b, inplace=True)


def by_another_name(x):
    y = x
    y += 1


def a_view_by_another_name(x):
    y = x.view(-1)
    y *= 2
    size = count = x.shape[0]
    count -= 1
    x[size - 1] = 0.0


def part_of_a_tuple_that_is_read(x):
    parts = x.chunk(2, 1)
    parts[0].mul_(2)
    return torch.cat(parts, 1)


def filled(x):
    y = torch.zeros(x.shape[0], *x.shape[1:])
    y[:, :4, 1:] = x[:, 4:, :-1]
    y[:, 4:] += x[:, :4]
    return y


def item_of_a_tuple(x):
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    low.add_(1)
    return x + low + high


def both_ways(x):
    y = x[:, :2]
    x.mul_(2)
    y.add_(1)


def the_view_is_read(x):
    y = x[:, :4]
    y.mul_(2)
    return torch.cat([x, y], 1)


def an_older_view_is_read(x):
    y = x[:, :4]
    z = y[:, 1:]
    x.add_(1)
    return z


def a_sibling_is_read(x):
    y = x.view(x.shape[0], -1)
    x[:, 2].zero_()
    return y


def a_copy_is_read(x):
    y = x[:, [0, 2]]
    z, w = x[:, INDEX], x.transpose(1, 2).reshape(x.shape[0], -1)
    x.add_(1)
    return torch.cat([y, z, w.reshape(-1, 8, 6, 6)], 1)


def a_copy_is_changed(x):
    y = x.permute(0, 2, 3, 1).contiguous()
    y.mul_(3)
    x[:, INDEX].zero_()
    x[x < 0].zero_()


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "x[:, :2] = 0": item((WHOLE, slice(2)), 0.0),
    "x[0] = 0": item(0, 0.0),
    "x[..., 0] = 1": item((..., 0), 1.0),
    "x[:, None] = 0": item((WHOLE, None, 0), 0.0),
    "x[mask] = 0": lambda x: item(x < 0, 0.0)(x),
    "x[:, tensor] = 0": item((WHOLE, INDEX), 0.0),
    "x[:, list] = 0": item((WHOLE, [1, 3]), 0.0),
    "x[:, :2] *= 3": scaled_item,
    "x[..., 0] += 1": raised_item,
    "x[:, :2] = x[:, 2:4]": copied_item,
    "x[:, 0] = 0 and a view": item_twice,
    "operator.setitem": lambda x: operator.setitem(x, (WHOLE, 0), 0.0),
    "operator.iadd": lambda x: operator.iadd(x[:, 1:3], 1),
    "x[...].add_": lambda x: x[..., 0].add_(1),
    "copy_": lambda x: x[:, :2].copy_(x[:, 2:4]),
    "view.mul_": lambda x: x.view(-1).mul_(2),
    "view_as": lambda x: x.view_as(x).mul_(2),
    "reshape": lambda x: x.reshape(x.size(0), -1).add_(1),
    "flatten": lambda x: torch.flatten(x, 1).clamp_(-0.5, 0.5),
    "flatten, F.relu": lambda x: F.relu(x.flatten(1), inplace=True),
    "unflatten": lambda x: x.unflatten(1, (2, 4))[:, 0].mul_(0),
    "narrow": lambda x: x.narrow(1, 0, 2).fill_(0),
    "torch.narrow": lambda x: torch.narrow(x, 1, 0, 2).zero_(),
    "select": lambda x: x.select(1, 0).sub_(1),
    "diagonal": lambda x: torch.diagonal(x, dim1=2, dim2=3).fill_(0),
    "transpose": lambda x: x.transpose(1, 2)[:, 0].add_(1),
    "permute": lambda x: x.permute(0, 2, 3, 1)[..., 0].relu_(),
    "mT": lambda x: x.mT[..., 0].mul_(2),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1).mul_(0.5),
    "detach": lambda x: x.detach().mul_(2),
    "data": lambda x: x.data.mul_(2),
    "contiguous": lambda x: x.contiguous().add_(1),
    "float": lambda x: x.float().add_(1),
    "masked_fill_": lambda x: x[:, :4].masked_fill_(DIAGONAL, 0),
    "index_fill_": lambda x: x[:2].index_fill_(1, INDEX, 0.0),
    "torch.relu_": lambda x: torch.relu_(x[:, :3]),
    "hardtanh_": lambda x: F.hardtanh_(x[:, :3]),
    "leaky_relu_": lambda x: F.leaky_relu_(x[:, :3], 0.3),
    "chunk": part_of_a_chunk,
    "split": part_of_a_split,
    "unbind": lambda x: x.unbind(1)[0].add_(1),
    "tensor_split": lambda x: x.tensor_split((2,), 1)[1].mul_(2),
    "a view of a view": lambda x: x[:, :4][:, :2].zero_(),
    "chain": lambda x: x[:, :4].mul_(2).add_(1),
    "y = x; y += 1": by_another_name,
    "y = x.view(-1); y *= 2": a_view_by_another_name,
    "a tuple is read": part_of_a_tuple_that_is_read,
    "filled": filled,
    "an item of a tuple": item_of_a_tuple,
    "both ways": both_ways,
    "the view is read": the_view_is_read,
    "an older view is read": an_older_view_is_read,
    "a sibling is read": a_sibling_is_read,
    "a copy is read": a_copy_is_read,
    "a copy is changed": a_copy_is_changed,
}


class Changing(nn.Module):
    """Changes the outputs of a convolution each."""

    def __init__(self, changes=CHANGES):
        super().__init__()
        self.convs = nn.ModuleDict({str(k): nn.Conv2d(3, 8, 3) for k in range(len(changes))})
        self.changes = list(changes.values())

    def forward(self, image):
        results = []
        for conv, change in zip(self.convs.values(), self.changes, strict=True):
            x = conv(image)
            result = change(x)
            results += [x, x if result is None else result]
        return results


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()  # autograd allows no change of a part of a chunk
def test_every_change_reaches_all_who_share_the_memory(tmp_path):
    torch.manual_seed(0)
    model = Changing().eval()
    converted = qrecipe.quantize(model, recipe(), [IMAGES] * 10, progress=False)
    for batch in (IMAGES, IMAGES[:3]):
        pairs = zip(model(batch), converted(batch), strict=True)
        for name, (expected, found) in zip([n for n in CHANGES for _ in "xy"], pairs, strict=True):
            assert sqnr_db(expected, found) > 25, name
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", model)
    assert all(map(torch.equal, loaded(IMAGES), converted(IMAGES)))


class ReadAfterwards(Changing):
    """Convolves what a change has made of the output of a convolution."""

    def __init__(self, changes):
        super().__init__(changes)
        self.heads = nn.ModuleDict({name: nn.Conv2d(8, 2, 3) for name in self.convs})

    def forward(self, image):
        results = []
        parts = zip(self.convs.values(), self.changes, self.heads.values(), strict=True)
        for conv, change, head in parts:
            x = conv(image)
            change(x)
            results.append(head(x))
        return results


EXPORTED = [name for name in CHANGES if name != "data"]  # torch.export fails for that one


@torch.no_grad()
@pytest.mark.parametrize(
    "names",
    [EXPORTED[:3], pytest.param(EXPORTED[3:], marks=pytest.mark.slow)],
    ids=["first", "others"],
)
def test_quantized_layers_read_what_a_change_has_made_in_a_program_too(names, tmp_path):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    changes = {name: CHANGES[name] for name in names}
    model = ReadAfterwards(changes).eval()
    converted = qrecipe.quantize(
        model, "builtin:x86-static-minmax", [IMAGES] * 10, executor="pt2e", progress=False
    )
    for name, expected, found in zip(changes, model(IMAGES), converted(IMAGES), strict=True):
        assert sqnr_db(expected, found) > 25, name
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", model)
    assert all(map(torch.equal, loaded(IMAGES), converted(IMAGES)))


def marked_zeros(self, x, index):
    marks = torch.zeros(16)
    marks[index] = 1
    return marks


def marked_copy(self, x, index):
    marks = self.zeros.clone()
    marks[index] = 1
    return marks


def marked_memory(self, x, index):
    marks = torch.empty(x.shape[0], 16)
    marks[:, ::2] = 0
    marks[:, 1::2] = 0
    marks[:, index] = 1
    return marks


@pytest.mark.parametrize("marks", [marked_zeros, marked_copy, marked_memory])
@torch.no_grad()
def test_what_a_program_writes_to_constants_is_gone_in_the_next_call(marks):
    pytest.importorskip("torchao")
    model = net_of(
        lambda self, x, index: self.last(self.first(x) * marks(self, x, index)),
        first=nn.Linear(8, 16),
        last=nn.Linear(16, 4),
    )
    model.register_buffer("zeros", torch.zeros(16))
    batches = [(torch.randn(16, 8), torch.tensor([k, k + 1])) for k in range(10)]
    converted = qrecipe.quantize(
        model, "builtin:x86-static-minmax", batches, executor="pt2e", progress=False
    )
    for batch in [*batches, *batches]:
        assert sqnr_db(model(*batch), converted(*batch)) > 20


def test_torch_loses_a_change_through_a_view_silently():
    model = net_of(lambda self, x: the_view_is_read(self.conv(x)), conv=nn.Conv2d(3, 8, 3))
    assert sqnr_db(model(IMAGES), plain.converted(model, plain.everything(), IMAGES)(IMAGES)) < 15


def test_the_plan_says_what_a_change_is():
    found = sites(qrecipe.plan(Changing({"": copied_item}).eval(), recipe(), IMAGES))
    assert found["convs.0"].verdict == "quantized"
    assert found[":getitem"].verdict == "passthrough"
    assert "no quantized kernel for setitem" in found[":setitem"].reason


def test_a_change_without_other_readers_costs_nothing():
    model = net_of(
        lambda self, x: F.relu(self.conv(x).flatten(1), inplace=True), conv=nn.Conv2d(3, 8, 3)
    )
    plan = qrecipe.plan(model, recipe(), IMAGES)
    assert [site.verdict for site in plan.sites] == ["quantized", "passthrough", "passthrough"]


def test_changes_are_trained():
    model = net_of(lambda self, x: the_view_is_read(self.conv(x)), conv=nn.Conv2d(3, 8, 3))
    compiled = qrecipe.compile(model, recipe(head='phase = "qat"'), IMAGES)
    prepared = compiled.prepare().train()
    prepared(IMAGES).sum().backward()
    assert prepared.conv.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert sqnr_db(model(IMAGES), compiled.convert(prepared)(IMAGES)) > 25


def test_the_outputs_of_a_recurrent_layer_are_no_views():
    def forward(self, x):
        y, (h, _) = self.lstm(x)
        return F.relu(y, inplace=True) + h[0]

    model = net_of(forward, lstm=nn.LSTM(6, 6))
    rows = torch.randn(4, 3, 6)
    converted = qrecipe.quantize(model, "builtin:x86-dynamic", [rows], progress=False)
    assert sqnr_db(model(rows), converted(rows)) > 30


@pytest.mark.parametrize(
    "change",
    [
        lambda x: torch.cat([torch.add(x[:, :2], 1, out=x[:, 2:4]), x], 1),
        lambda x: torch.cat([x.as_strided((4, 2), (1, 2)).mul_(2).sum() + x, x], 1),
    ],
    ids=["out", "unknown view"],
)
@torch.no_grad()
def test_what_cannot_be_followed_is_refused_and_not_lost(change):
    model = net_of(lambda self, x: change(self.conv(x).detach()), conv=nn.Conv2d(3, 8, 3))
    with pytest.raises(PlanError, match="QR306"):
        qrecipe.plan(model, recipe(), IMAGES)
