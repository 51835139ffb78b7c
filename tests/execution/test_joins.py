"""Sums and products of int8 tensors read both in one shape and layout: else they are slow."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from plans import net_of
from runs import silent
from torch import nn
from torch.overrides import TorchFunctionMode

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.model.integers import laid_out_like

RECIPE = "builtin:x86-static-minmax"
IMAGES = torch.randn(4, 8, 12, 12, generator=torch.Generator().manual_seed(0))
JOINS = {"add", "add_relu", "mul", "mul_relu"}

pytestmark = pytest.mark.filterwarnings("ignore::qrecipe.QRecipeWarning")


def _layout(x):
    """The strides, without those that say nothing."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


class Joined(TorchFunctionMode):
    """Keeps the shapes and strides that sums and products of quantized tensors read."""

    def __init__(self):
        super().__init__()
        self.read = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("quantized.") and str(func).split(".")[1] in JOINS:
            self.read.append([(x.shape, _layout(x)) for x in args[:2]])
        return func(*args, **(kwargs or {}))


def _input_and_convolution(self, x):
    return self.last(F.relu(x + self.a(x)))


def _convolution_and_input(self, x):
    return self.last(self.a(x) * x)


def _gate(self, x):
    y = self.a(x)
    return self.last(y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True))))


def _gate_in_front(self, x):
    return self.last(torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1))) * self.a(x))


def _turned(self, x):
    return self.last(self.a(x) + self.b(x).transpose(2, 3))


def _tokens(self, x):
    y = self.a(x).flatten(2)
    return self.tokens(y.transpose(1, 2) + x.flatten(2).transpose(1, 2).contiguous())


def _convolutions(self, x):
    y = F.max_pool2d(F.relu(self.a(x)), 2)
    return self.last(F.relu(y + self.b(y)) + self.a(y))


FORWARDS = (
    *(_input_and_convolution, _convolution_and_input, _gate, _gate_in_front),
    *(_turned, _tokens, _convolutions),
)


def network(forward):
    torch.manual_seed(0)
    return net_of(
        forward,
        a=nn.Conv2d(8, 8, 3, padding=1),
        b=nn.Conv2d(8, 8, 1),
        gate=nn.Conv2d(8, 8, 1),
        last=nn.Conv2d(8, 4, 1),
        tokens=nn.Linear(8, 4),
    )


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_join_reads_one_shape_and_layout_in_whatever_layout_images_come(forward):
    model = network(forward)
    converted = qrecipe.quantize(model, RECIPE, [IMAGES] * 2, progress=silent)
    for images in (IMAGES, IMAGES.contiguous(memory_format=torch.channels_last), IMAGES[:1]):
        with Joined() as joined, torch.no_grad():
            output = converted(images)
        assert joined.read
        assert all(one == other for one, other in joined.read)
        assert sqnr_db(model(images), output) > 25


def _int8(*shape, layout=torch.contiguous_format):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return torch.quantize_per_tensor(x, 0.05, 64, torch.quint8).contiguous(memory_format=layout)


LAST, LAST_3D = torch.channels_last, torch.channels_last_3d


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (_int8(2, 8, 4, 4), _int8(1)),
        (_int8(2, 5, 8), _int8(8)),
        (_int8(2, 8, 4, 4, layout=LAST), _int8(8, 4, 4)),
        (_int8(2, 8, 1, 4), _int8(2, 8, 4, 1)),
        (_int8(2, 128, 4, 4, layout=LAST), _int8(2, 128, 1, 1)),
        (_int8(2, 8, 3, 4, 4, layout=LAST_3D), _int8(2, 8, 1, 1, 1)),
    ],
)
def test_broadcasts_that_kernels_do_well_are_left_to_them(x, y):
    assert laid_out_like(x, y) is x
    assert laid_out_like(y, x) is y


def test_volumes_keep_the_layout_that_convolutions_give():
    x, y = _int8(2, 8, 3, 4, 4, layout=LAST_3D), _int8(2, 8, 3, 4, 4)
    for one, other in ((x, y), (y, x)):
        assert laid_out_like(one, other).is_contiguous(memory_format=LAST_3D)


def test_what_convolutions_give_is_added_as_it_is():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.pool = nn.Conv2d(8, 8, 1), nn.MaxPool2d(2)
            self.body = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))

        def forward(self, x):
            x = self.pool(F.relu(self.stem(x)))
            return self.body(F.relu(x + self.body(x)))

    torch.manual_seed(0)
    converted = qrecipe.quantize(Block().eval(), RECIPE, [IMAGES] * 2, progress=silent)
    assert laid_out_like not in [node.target for node in converted.graph.nodes]
    with Joined() as joined, torch.no_grad():
        converted(IMAGES)
    assert joined.read
    assert all(one == other for one, other in joined.read)


def test_long_chains_of_sums_take_no_longer_than_their_length():
    def doubled(self, x):
        y = self.a(x)
        for _ in range(40):  # each is read twice: as many paths as 2 to this
            y = y + F.relu(y)
        return self.last(y)

    converted = qrecipe.quantize(network(doubled), RECIPE, [IMAGES] * 2, progress=silent)
    assert [str(node.target) for node in converted.graph.nodes].count("quantized.add") == 40


def test_it_computes_what_torch_does_and_survives_storage_and_script(tmp_path):
    model = network(_gate)
    converted = qrecipe.quantize(model, RECIPE, [IMAGES] * 2, progress=silent)
    plain = copy.deepcopy(converted)
    for node in plain.graph.nodes:
        if node.target is laid_out_like:
            node.replace_all_uses_with(node.args[0])
    plain.graph.eliminate_dead_code()
    plain.recompile()
    assert torch.equal(plain(IMAGES), converted(IMAGES))
    file = tmp_path / "model.safetensors"
    qrecipe.save_quantized(converted, file)
    loaded = qrecipe.load_quantized(file, network(_gate))
    for each in (loaded, torch.jit.script(converted)):
        assert torch.equal(each(IMAGES), converted(IMAGES))


def test_a_layout_that_kernels_are_slow_with_is_written_out():
    x = _int8(2, 16, 8).transpose(1, 2)
    assert laid_out_like(x, x.clone()).is_contiguous()


def test_sums_of_what_convolutions_of_sequences_give_read_contiguous_tensors():
    model = net_of(
        lambda self, x: self.last(F.relu(self.a(x) + self.b(x))),
        a=nn.Conv1d(8, 8, 3, padding=1),
        b=nn.Conv1d(8, 8, 1),
        last=nn.Conv1d(8, 4, 1),
    )
    sequences = IMAGES.flatten(2)
    converted = qrecipe.quantize(model, RECIPE, [sequences] * 2, progress=silent)
    with Joined() as joined, torch.no_grad():
        output = converted(sequences)
    assert joined.read == [[((4, 8, 144), [1152, 144, 1])] * 2]
    assert sqnr_db(model(sequences), output) > 25
