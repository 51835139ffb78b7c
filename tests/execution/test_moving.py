"""Whatever moves numbers moves integers: each spelling, with the bits that float moves."""

import io
import operator
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from artifacts import MODES
from export_recipes import EXECUTORCH
from plans import net_of, recipe, verdicts
from runs import silent
from shares import every
from torch import nn

import qrecipe
from qrecipe._torch_ao import is_observer
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.execution.fx.lowering import lower_ours
from qrecipe.model.integers import padded, resampled, rolled
from qrecipe.model.opened.windows import from_windows, into_windows

WHOLE = slice(None)
INDEX = torch.tensor([5, 0, 2])

SPELLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor] | nn.Module] = {
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "torch.permute": lambda x: torch.permute(x, (0, 2, 3, 1)),
    "permute by name": lambda x: torch.permute(input=x, dims=(0, 2, 3, 1)),
    "transpose": lambda x: x.transpose(1, 2),
    "torch.transpose": lambda x: torch.transpose(x, 1, -1),
    "swapaxes": lambda x: x.swapaxes(1, 2),
    "torch.swapaxes": lambda x: torch.swapaxes(x, 1, 2),
    "swapdims": lambda x: x.swapdims(1, 2),
    "torch.swapdims": lambda x: torch.swapdims(x, 1, 2),
    "movedim": lambda x: x.movedim(1, -1),
    "torch.movedim": lambda x: torch.movedim(x, (1, 2), (3, 1)),
    "moveaxis": lambda x: x.moveaxis(1, -1),
    "torch.moveaxis": lambda x: torch.moveaxis(x, 1, -1),
    "mT": lambda x: x.mT,
    "T": lambda x: x[0, 0].T,
    "H": lambda x: x[0, 0].H,
    "t": lambda x: x[0, 0].t(),
    "adjoint": lambda x: x.adjoint(),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
    "torch.reshape": lambda x: torch.reshape(x, (x.size(0), 2, -1)),
    "view": lambda x: x.view(x.shape[0], 2, -1),
    "flatten": lambda x: x.flatten(1),
    "torch.flatten": lambda x: torch.flatten(x, 1),
    "nn.Flatten": nn.Flatten(),
    "ravel": lambda x: x.ravel(),
    "unflatten": lambda x: x.unflatten(1, (2, -1)),
    "torch.unflatten": lambda x: torch.unflatten(x, 1, (2, -1)),
    "nn.Unflatten": nn.Unflatten(1, (2, 4)),
    "unsqueeze and squeeze": lambda x: torch.squeeze(x.unsqueeze(1), 1),
    "expand": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "expand_as": lambda x: x[:, :1].expand_as(x),
    "reshape_as": lambda x: x.reshape_as(other=x.transpose(1, 2)),
    "view_as": lambda x: x.view_as(x.flatten(2)),
    "torch.broadcast_to": lambda x: torch.broadcast_to(x.unsqueeze(1), (-1, 2, -1, -1, -1)),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "tile": lambda x: x.tile(1, 2, 1, 1),
    "torch.tile": lambda x: torch.tile(x, (1, 2, 1, 1)),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "torch.repeat_interleave": lambda x: torch.repeat_interleave(x, 2, dim=1),
    "slices": lambda x: x[:, 1:-1, ::2],
    "number": lambda x: x[:, -1],
    "ellipsis": lambda x: x[..., 0],
    "none": lambda x: x[:, None],
    "size": lambda x: x[:, : x.shape[1] // 2],
    "operator.getitem": lambda x: operator.getitem(x, (WHOLE, 0)),
    "tensor": lambda x: x[:, INDEX],
    "list": lambda x: x[:, [0, 2]],
    "mask": lambda x: x[:, torch.arange(8) % 3 == 0],
    "narrow": lambda x: x.narrow(1, 1, 3),
    "torch.narrow": lambda x: torch.narrow(x, 1, 1, x.size(1) - 2),
    "select": lambda x: x.select(1, 2),
    "torch.select": lambda x: torch.select(x, 1, 2),
    "index_select": lambda x: x.index_select(1, INDEX),
    "torch.index_select": lambda x: torch.index_select(x, 1, INDEX),
    "diagonal": lambda x: x.diagonal(dim1=2, dim2=3),
    "chunk": lambda x: x.chunk(2, 1)[1],
    "torch.chunk": lambda x: torch.chunk(x, 3, dim=1)[-1],
    "split": lambda x: x.split(3, 1)[2],
    "torch.split": lambda x: torch.split(x, [3, 1, 4], dim=1)[0],
    "split_with_sizes": lambda x: x.split_with_sizes([3, 5], 1)[1],
    "unbind": lambda x: x.unbind(1)[3],
    "torch.unbind": lambda x: torch.unbind(x, 1)[-1],
    "tensor_split": lambda x: x.tensor_split((1, 5), 1)[1],
    "torch.tensor_split": lambda x: torch.tensor_split(x, 3, dim=1)[0],
    "hsplit": lambda x: x.hsplit(2)[1],
    "torch.vsplit": lambda x: torch.vsplit(x, (1,))[0],
    "cat of chunks": lambda x: torch.cat(x.chunk(2, 1), 2),
    "cat of chunks by name": lambda x: torch.cat(tensors=torch.chunk(x, chunks=2, dim=1), dim=3),
    "reversed": lambda x: torch.cat(x.chunk(4, 1)[::-1], 1),
    "some chunks": lambda x: torch.concat(x.chunk(4, 1)[:2], 1),
    "one of some": lambda x: x.chunk(4, 1)[1:][1],
    "list of chunks": lambda x: torch.cat([x, *x.chunk(2, 1)], 1),
    "cat of a split": lambda x: torch.cat(torch.split(x, [4, 4], dim=1), dim=-1),
    "cat of split_with_sizes": lambda x: torch.cat(x.split_with_sizes([3, 5], 1)[::-1], 1),
    "stack of a tensor_split": lambda x: torch.stack(x.tensor_split(4, 1), -1),
    "stack of a torch.tensor_split": lambda x: torch.stack(torch.tensor_split(x, (4,), 1)),
    "cat of an hsplit": lambda x: torch.cat(x.hsplit(2), 2),
    "iterated unbind": lambda x: torch.stack([*x.unbind(1)], -1),
    "iterated split": lambda x: torch.cat(list(x.split(3, 1))[1:], 1),
    "torch.hstack": lambda x: torch.hstack([x, x]),
    "torch.vstack": lambda x: torch.vstack((x, x)),
    "torch.dstack": lambda x: torch.dstack(tensors=(x, x)),
    "torch.column_stack": lambda x: torch.column_stack((x, x)),
    "hstack of chunks": lambda x: torch.hstack(x.chunk(2, 2)),
    "flip": lambda x: x.flip(1),
    "torch.flip": lambda x: torch.flip(x, (2, 3)),
    "fliplr": lambda x: x.fliplr(),
    "torch.flipud": lambda x: torch.flipud(x),
    "rot90": lambda x: x.rot90(1, (2, 3)),
    "roll": lambda x: x.roll(2, 1),
    "torch.roll": lambda x: torch.roll(x, shifts=(-1, 20), dims=(2, -1)),
    "F.pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "pad by name": lambda x: F.pad(input=x, pad=(0, 0, 1, 1), mode="constant", value=0.0),
    "crop": lambda x: F.pad(x, (-1, 1)),
    "pad channels": lambda x: F.pad(x, (0, 0, 0, 0, 0, 3)),
    "reflect": lambda x: F.pad(x, (1, 1, 2, 2), mode="reflect"),
    "nn.ZeroPad2d": nn.ZeroPad2d((0, 1, 0, 1)),
    "nn.ConstantPad2d": nn.ConstantPad2d(1, 0.0),
    "nn.ReflectionPad2d": nn.ReflectionPad2d(1),
    "F.interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "interpolate to a size": lambda x: F.interpolate(x, (5, 9), mode="nearest"),
    "nn.Upsample": nn.Upsample(scale_factor=2),
    "nn.UpsamplingNearest2d": nn.UpsamplingNearest2d(size=(5, 9)),
    "F.pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "nn.PixelShuffle": nn.PixelShuffle(2),
    "F.pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "nn.PixelUnshuffle": nn.PixelUnshuffle(2),
    "torch.channel_shuffle": lambda x: torch.channel_shuffle(x, 2),
    "F.channel_shuffle": lambda x: F.channel_shuffle(x, 4),
    "nn.ChannelShuffle": nn.ChannelShuffle(2),
    "masked_fill": lambda x: x.masked_fill(torch.eye(6, dtype=torch.bool), 0.0),
    "torch.masked_fill": lambda x: torch.masked_fill(x, torch.eye(6, dtype=torch.bool), 0),
    "clone": lambda x: x.clone(),
    "torch.clone": lambda x: torch.clone(x),
    "contiguous": lambda x: x.contiguous(),
    "detach": lambda x: x.detach(),
    "torch.cat": lambda x: torch.cat((x, x), 1),
    "torch.concat": lambda x: torch.concat((x, x), 1),
    "torch.concatenate": lambda x: torch.concatenate(tensors=(x, x), dim=1),
    "torch.stack": lambda x: torch.stack([x, x], 1),
    "F.max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, 2),
    "nn.MaxPool2d": nn.MaxPool2d(2),
}


class Spelt(nn.Module):
    """A convolution whose output is moved in all spellings."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.moves = nn.ModuleList(map(_module, SPELLINGS.values()))

    def forward(self, x):
        x = self.conv(x)
        return [x, *(move(x) for move in self.moves)]


def _module(move):
    return move if isinstance(move, nn.Module) else net_of(lambda self, x: move(x))


def converted_of(model, batch, backend="x86", rules=""):
    compiled = qrecipe.compile(model, recipe(rules, head=f'backend = "{backend}"'), batch)
    prepared = compiled.prepare()
    qrecipe.calibrate(prepared, [batch] * 10, progress=silent)
    return compiled.plan, compiled.convert(prepared)


@pytest.mark.parametrize("backend", every(4, ["x86", "fbgemm", "onednn", "qnnpack"]))
def test_every_spelling_moves_integers(backend):
    torch.manual_seed(0)
    model, image = Spelt().eval(), torch.randn(2, 3, 6, 6)
    plan, converted = converted_of(model, image, backend)
    assert {site.verdict for site in plan.sites[1:]} == {"passthrough"}
    assert count(converted, torch.quantize_per_tensor) == 1
    assert count(converted, "dequantize") == 1 + len(SPELLINGS)  # the outputs
    for batch in (image, torch.randn(3, 3, 6, 6)):
        x, *results = converted(batch)
        for (name, move), result in zip(SPELLINGS.items(), results, strict=True):
            assert torch.equal(result, move(x.contiguous())), name


def count(graph_module, target):
    return sum(node.target == target for node in graph_module.graph.nodes)


def shuffling():
    def forward(self, x):
        a, b = self.first(x).chunk(2, 1)
        x = F.pad(torch.cat([b, a], 1).roll((1, -2), (2, 3)), (1, 0))
        return self.second(x[..., 1:])

    torch.manual_seed(0)
    return net_of(forward, first=nn.Conv2d(3, 8, 3), second=nn.Conv2d(8, 4, 3))


IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def test_each_says_whose_integers_it_moves():
    plan = qrecipe.plan(shuffling(), recipe(), IMAGES)
    reasons = {site.name: site.reason for site in plan.sites}
    assert reasons[":chunk"] == "moves the integers of first"
    assert reasons[":cat"] == "follows :chunk"
    assert reasons[":getitem"] == "moves the integers of :pad"


@pytest.mark.parametrize("name", [":chunk", ":cat", "second"])
def test_the_plan_counts_each_result_that_goes_to_float(name):
    rules = f'[rules.module_name]\n"{name}" = "float"'
    plan, converted = converted_of(shuffling(), IMAGES, rules=rules)
    quantized = count(converted, torch.quantize_per_tensor)
    assert plan.boundaries == quantized + count(converted, "dequantize")
    assert count(converted, "chunk") == 1


def _read_by_layers(self, x):
    x = self.first(x).flatten(2).transpose(1, 2)
    _, part = x.chunk(2, 1)
    both = x.narrow(1, 2, 3)
    return self.own(x[:, 0]), self.part(part), self.sixteen(both), self.static(both)


def test_integers_are_moved_for_layers_that_round_their_input_themselves():
    layers = {name: nn.Linear(8, 8) for name in ("own", "part", "sixteen", "static")}
    model = net_of(_read_by_layers, first=nn.Conv2d(3, 8, 3), **layers)
    rules = "[rules.module_name]\n" + '"{own,part}" = "dynamic"\n"sixteen" = "half"\n'
    plan, converted = converted_of(model, IMAGES, rules=MODES + rules)
    assert [plan[name].mode for name in layers] == ["dynamic"] * 3 + ["static"]
    assert all(plan[name].verdict == "passthrough" for name in (":getitem", ":chunk", ":narrow"))
    pairs = zip(model(IMAGES), converted(IMAGES), strict=True)
    assert min(sqnr_db(x, y) for x, y in pairs) > 20


def test_moved_integers_are_loaded_as_they_were_saved(tmp_path):
    model = shuffling()
    _, converted = converted_of(model, IMAGES)
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", model)
    assert torch.equal(loaded(IMAGES), converted(IMAGES))


def test_training_simulates_one_range_along_the_moves():
    compiled = qrecipe.compile(shuffling(), recipe(head='phase = "qat"'), IMAGES)
    prepared = compiled.prepare().train()
    modules = dict(prepared.named_modules(remove_duplicate=False))
    called = [modules[n.target] for n in prepared.graph.nodes if n.op == "call_module"]
    ranges = [module for module in called if is_observer(module)]
    assert len(ranges) == 4  # of the input, of both convolutions, and of what is joined
    assert len(set(ranges)) == 3
    prepared(IMAGES).sum().backward()
    converted = compiled.convert(prepared)
    assert count(converted, torch.quantize_per_tensor) == count(converted, "dequantize") == 1


def test_parts_do_not_narrow_the_average_of_the_range_that_they_share():
    def scale(forward):
        torch.manual_seed(0)
        model = net_of(forward, conv=nn.Conv2d(3, 8, 3))
        with torch.no_grad():
            model.conv.weight[1:] /= 4  # only the first channel is wide
        return qrecipe.quantize(model, recipe(), [IMAGES] * 50, progress=False).conv.scale

    def parts(self, x):
        x = self.conv(x)
        return x, x[:, 1:], x.chunk(2, 1)[1], F.pad(x[:, 4], (1, 1))

    assert scale(parts) == scale(lambda self, x: self.conv(x))


def test_a_backend_that_only_exports_is_told_of_no_moves():
    plan = qrecipe.plan(shuffling(), qrecipe.parse_recipe(EXECUTORCH), IMAGES)
    assert {":chunk": "float", ":roll": "float"}.items() <= verdicts(plan).items()


@pytest.mark.slow
def test_qnnpacks_softmax_is_right_on_integers_that_are_not_contiguous():
    model = net_of(
        lambda self, x: self.softmax(self.conv(x).chunk(2, 1)[1]),
        conv=nn.Conv2d(3, 8, 3),
        softmax=nn.Softmax(1),
    )
    with (
        patch("qrecipe.execution.fx.convert.take_any_layout"),
        pytest.raises(qrecipe.AuditError, match="QR411 the quantized kernel of softmax"),
    ):
        converted_of(model, IMAGES, "qnnpack")
    _, converted = converted_of(model, IMAGES, "qnnpack")
    assert sqnr_db(model(IMAGES), converted(IMAGES)) > 30


def left_float(*names):
    def lower(reference, qconfigs):
        lower_ours(reference, {name: qconfigs[name] for name in qconfigs.keys() - set(names)})

    return patch("qrecipe.execution.fx.convert.lower_ours", lower)


@pytest.mark.parametrize("name", ["getitem", "getitem_1", "roll", "pad", "getitem_2"])
def test_the_audit_finds_a_move_that_is_left_float(name):
    with left_float(name), pytest.raises(qrecipe.AuditError, match=r"QR410 .*became float"):
        converted_of(shuffling(), IMAGES)


def test_the_audit_finds_moved_integers_that_get_another_scale():
    def doubled(x, widths):
        x = padded(x, widths)
        if not x.is_quantized:
            return x
        return torch._make_per_tensor_quantized_tensor(
            x.int_repr(), 2 * x.q_scale(), x.q_zero_point()
        )

    with (
        patch("qrecipe.execution.fx.lowering.padded", doubled),
        patch("qrecipe.model.moving.padded", doubled),
        pytest.raises(qrecipe.AuditError, match="QR411 the quantized kernel of :pad"),
    ):
        converted_of(shuffling(), IMAGES)


@pytest.mark.parametrize(
    ("move", "reason"),
    [
        (lambda x: F.pad(x, (1, 1), value=1.0), "a number other than 0"),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), "mode = 'replicate'"),
        (lambda x: x.masked_fill(x > 0, -1e9), "a number other than 0"),
        (lambda x: x.roll(1), "along given dimensions"),
        (lambda x: F.channel_shuffle(x.flatten(2), 2), "in four dimensions"),
        (lambda x: F.interpolate(x.flatten(2), scale_factor=2), "two or three dimensions"),
        (lambda x: x.gather(1, torch.zeros(1, 1, 1, 1, dtype=torch.long)), "no quantized kernel"),
    ],
)
def test_what_cannot_be_moved_stays_float_with_the_reason(move, reason):
    model = net_of(
        lambda self, x: self.move(self.conv(x)), conv=nn.Conv2d(3, 8, 3), move=_module(move)
    )
    plan = qrecipe.plan(model, recipe(), IMAGES)
    assert plan.sites[-1].verdict == "float"
    assert reason in plan.sites[-1].reason


@pytest.mark.parametrize(
    "parts",
    [lambda x: x.split(4, 1), lambda x: x.unbind(1), lambda x: x.chunk(2), lambda x: x.chunk(5, 1)],
)
def test_parts_whose_number_may_change_stay_float_together(parts):
    model = net_of(lambda self, x: torch.cat(parts(self.conv(x)), 1), conv=nn.Conv2d(3, 8, 3))
    plan, converted = converted_of(model, IMAGES)
    assert "their number may depend" in plan.sites[1].reason
    assert sqnr_db(model(IMAGES[:1]), converted(IMAGES[:1])) > 30


def test_parts_that_were_counted_are_refused_in_another_number():
    model = net_of(lambda self, x: sum([*self.conv(x).unbind(3)]), conv=nn.Conv2d(3, 8, 3))
    _, converted = converted_of(model, IMAGES)
    assert count(converted, "dequantize") == 1
    with pytest.raises(AssertionError, match="other shapes"):
        converted(torch.randn(1, 3, 12, 10))


@pytest.mark.parametrize(
    ("move", "shape"),
    [
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), (1, 4, 5, 5)),
        (lambda x: F.pad(x, (1,) * 6, mode="reflect"), (1, 4, 5, 5, 5)),
        (lambda x: x.roll(1, 1), (1, 4, 5, 5)),
        (lambda x: F.channel_shuffle(x, 2), (1, 4, 5)),
        (lambda x: F.interpolate(x, scale_factor=2), (1, 4, 5)),
        (lambda x: x.gather(1, torch.zeros(1, 1, 1, 1, dtype=torch.long)), (1, 4, 5, 5)),
    ],
)
def test_torch_has_no_kernel_for_these_integers(move, shape):
    x = torch.randn(shape)
    move(x)
    with pytest.raises(RuntimeError):
        move(torch.quantize_per_tensor(x, 0.1, 7, torch.quint8))


def test_torch_cannot_pad_the_integers_that_a_convolution_in_three_dimensions_gives():
    x = torch.randn(1, 4, 5, 5, 5).contiguous(memory_format=torch.channels_last_3d)
    integers = torch.quantize_per_tensor(x, 0.1, 7, torch.quint8)
    with pytest.raises(RuntimeError, match="Quantized copy only works"):
        F.pad(integers, (1, 1))
    assert torch.equal(
        padded(integers, [1, -2]).dequantize(), F.pad(integers.dequantize(), (1, -2))
    )


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: x.reshape(x.size(0), x.numel() // x.size(0)),
        lambda x: x.flatten(1) if x.ndim is None else x.flatten(x.dim() - 3),
    ],
    ids=["shape", "size and numel", "rank"],
)
def test_a_shape_is_read_from_integers(read):
    model = net_of(lambda self, x: self.last(read(self.conv(x))), conv=nn.Conv2d(3, 4, 1))
    model.last = nn.Linear(4 * 6 * 6, 2)
    x = torch.randn(2, 3, 6, 6)
    _, converted = converted_of(model.eval(), x)
    assert count(converted, "dequantize") == count(converted, torch.quantize_per_tensor) == 1
    assert sqnr_db(model(x), converted(x)) > 25


@pytest.mark.parametrize(
    ("shifts", "dims"), [([1, -2], [2, 3]), ([0], [1]), ([-7, 20, 3], [2, -1, 2]), ([5], [0])]
)
def test_integers_are_rolled_like_floats(shifts, dims):
    integers = torch.quantize_per_tensor(torch.randn(2, 3, 5, 6), 0.1, 7, torch.quint8)
    found = rolled(integers, shifts, dims)
    assert found.is_quantized
    assert torch.equal(found.dequantize(), integers.dequantize().roll(shifts, dims))


@pytest.mark.parametrize(
    "move",
    [
        lambda x: padded(x, [1, x.shape[3] % 5 - 2, -1, 2]),
        lambda x: rolled(x, [1, -2, x.shape[2] // 2], [2, 3, 2]),
    ],
    ids=["padded", "rolled"],
)
def test_a_trace_moves_integers_of_other_sizes_too(move):
    small, large = (
        torch.quantize_per_tensor(torch.randn(2, 3, *size), 0.1, 7, torch.quint8)
        for size in ((5, 6), (8, 9))
    )
    traced = torch.jit.trace(move, small)
    for x in (small, large):
        assert torch.equal(traced(x).int_repr(), move(x).int_repr())


SCRIPTED = {
    "pad": lambda x: F.pad(x, (0, 1, 0, 1)),
    "pad by a size": lambda x: F.pad(x, [-1, x.shape[3] % 5]),
    "roll": lambda x: x.roll(1, 2),
    "roll twice": lambda x: torch.roll(x, (1, -2), (2, -1)),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "to a size": lambda x: F.interpolate(x, x.shape[2:], mode="area"),
    "to a number": lambda x: F.interpolate(x, 5, mode="bilinear", align_corners=True),
    "module": nn.Upsample(scale_factor=1.5, mode="bilinear"),
}


@pytest.mark.parametrize("name", every(4, SCRIPTED))
def test_torchscript_compiles_what_moves_integers(name):
    model = net_of(
        lambda self, x: self.b(self.move(self.a(x))), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1)
    )
    model.move = SCRIPTED[name]
    plan, converted = converted_of(model, IMAGES)
    assert all(site.mode == "static" for site in plan.sites)
    for how in (torch.jit.script, lambda each: torch.jit.trace(each, IMAGES)):
        file = io.BytesIO()
        torch.jit.save(how(converted), file)
        file.seek(0)
        assert torch.equal(torch.jit.load(file)(IMAGES), converted(IMAGES))


@pytest.mark.parametrize(("mode", "size"), [("bilinear", (9, 11)), ("area", (3, 2))])
def test_averages_are_computed_in_float_and_keep_the_scale(mode, size):
    model = net_of(
        lambda self, x: F.interpolate(self.conv(x), size, mode=mode), conv=nn.Conv2d(3, 8, 3)
    )
    plan, converted = converted_of(model, IMAGES)
    assert "computed in float" in plan.sites[-1].reason
    assert count(converted, resampled) == 1
    integers = torch.quantize_per_tensor(IMAGES, 0.1, 7, torch.quint8)
    found, torchs = resampled(integers, size, mode=mode), F.interpolate(integers, size, mode=mode)
    assert (found.int_repr().int() - torchs.int_repr().int()).abs().max() <= 1


@pytest.mark.parametrize(("size", "shift"), [((8, 8), (0, 0)), ((10, 7), (2, 2)), ((3, 9), (2, 1))])
def test_integers_are_cut_into_windows_and_merged_like_floats(size, shift):
    floats = torch.randn(2, *size, 3)
    image = torch.quantize_per_tensor(floats, 0.1, 7, torch.quint8)
    windows = into_windows(image, (4, 4), shift)
    assert windows.is_quantized
    assert torch.equal(windows.dequantize(), into_windows(image.dequantize(), (4, 4), shift))
    merged = from_windows(windows, image.shape, (4, 4), shift)
    assert torch.equal(merged.int_repr(), image.int_repr())
