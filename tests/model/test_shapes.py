"""Python code with shapes is traced with those of the example, which the graph then asserts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from plans import net_of
from routed import recipe_of_roots
from runs import silent
from shares import every
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import TraceError
from qrecipe.model.caches import with_caches_without_values
from qrecipe.model.record import Shape, TracedPart
from qrecipe.model.trace import Subject, trace
from qrecipe.recipe.schema import FxTable

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LARGER = torch.randn(2, 3, 20, 24, generator=torch.Generator().manual_seed(1))
ODD = torch.randn(2, 3, 17, 19, generator=torch.Generator().manual_seed(2))
RECIPE = "builtin:x86-static-minmax"

pytestmark = pytest.mark.filterwarnings("ignore::qrecipe.QRecipeWarning")


def network(forward):
    torch.manual_seed(0)
    return net_of(forward, a=nn.Conv2d(3, 8, 3, 2, 1), b=nn.Conv2d(8, 4, 1))


def _star(self, x):
    y = self.a(x).relu()
    return self.b(y + torch.zeros(*y.shape[2:]))


def _rest(self, x):
    y = self.a(x).relu()
    batch, *rest = y.size()
    return self.b(y.reshape(batch, -1).view(batch, *rest))


def _tuple(self, x):
    height, width = tuple(x.shape)[2:]
    return self.b(F.interpolate(self.a(x).relu(), size=[height, width]))


def _listed(self, x):
    return self.b(F.interpolate(self.a(x).relu(), size=list(x.size()[2:])))


def _zipped(self, x):
    sizes = dict(zip("bchw", x.shape, strict=True))
    return self.b(F.interpolate(self.a(x).relu(), size=(sizes["h"], sizes["w"])))


def _grid(self, x):
    y = self.a(x).relu()
    lines = [torch.linspace(-1, 1, size) for size in y.shape[2:]]
    rows, columns = torch.meshgrid(*lines, indexing="ij")
    return self.b(y + rows + columns)


def _ranked(self, x):
    if len(x.shape) == 3 or x.ndim == 3:
        x = x[None]
    return self.b(self.a(x).relu())


def _checked(self, x):
    assert x.shape[1] == 3, f"{x.shape[1]} channels"
    y = self.a(x).relu()
    return self.b(y + torch.zeros(y.shape[0], 1, 1, 1))


def _compared(self, x):
    y = self.a(x).relu()
    if y.shape[-2:] != x.shape[-2:]:
        y = F.interpolate(y, x.shape[-2:])
    return self.b(y)


def _same(self, x):
    """Padding as in TensorFlow, which depends on the size."""
    (height, width), stride = x.size()[-2:], self.a.stride[0]
    high = max((math.ceil(height / stride) - 1) * stride + 3 - height, 0)
    wide = max((math.ceil(width / stride) - 1) * stride + 3 - width, 0)
    if high > 0 or wide > 0:
        x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
    return self.b(F.conv2d(x, self.a.weight, self.a.bias, stride).relu())


FOLLOWING = (_star, _rest, _tuple, _listed, _zipped, _grid, _ranked, _checked, _compared, _same)


@pytest.mark.parametrize("forward", every(3, FOLLOWING))
def test_code_that_takes_shapes_apart_is_traced_and_follows_other_sizes(forward, tmp_path):
    model = network(forward)
    converted = qrecipe.quantize(model, RECIPE, [IMAGES] * 2, progress=silent)
    for images in (IMAGES, LARGER, ODD):
        assert sqnr_db(model(images), converted(images)) > 25
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", network(forward))
    assert torch.equal(loaded(ODD), converted(ODD))


def _padded(self, x):
    extra = -x.shape[-1] % 4
    return self.b(self.a(F.pad(x, (0, extra)) if extra else x).relu())


def _scaled(self, x):
    y = self.a(x).relu()
    return self.b(F.interpolate(y, size=(int(y.shape[2] * 1.5), round(y.shape[3] * 1.5))))


@pytest.mark.parametrize("forward", [_padded, _scaled])
def test_a_size_for_which_the_model_would_compute_something_else_is_an_error(forward):
    model = network(forward)
    converted = qrecipe.quantize(model, RECIPE, [IMAGES] * 2, progress=silent)
    assert sqnr_db(model(IMAGES[:3]), converted(IMAGES[:3])) > 25
    with pytest.raises(AssertionError, match="inputs of other shapes than the example's"):
        converted(ODD)


_HEIGHTS = {17: 2.0}

ASKED = {
    "set": lambda x: x.shape[2] in {17},
    "dict": lambda x: x.shape[2] in _HEIGHTS,
    "tuple": lambda x: x.size(2) in (1, 17),
    "key": lambda x: _HEIGHTS.get(x.shape[2], 0) == 2,
    "pair": lambda x: (x.shape[2], x.size(-1)) in {(17, 19)},
    "shape": lambda x: x.shape[2:] in {(17, 19)},
    "computed": lambda x: x.shape[2] // 2 * 2 in {16} and x.shape[2] - 1 in frozenset({16}),
    "in the shape": lambda x: 17 in x.shape,
    "number": lambda x: isinstance(x.shape[2], int) and x.shape[2] == 17,
    "half": lambda x: isinstance(x.shape[2] / 2, float) and x.shape[2] / 2 == 8.5,
    "text": lambda x: {"17": True}.get(str(x.shape[2]), False),
    "texts": lambda x: f"{x.shape[2]}x{x.size(3):02}" == "17x19",
    "text of a shape": lambda x: str(x.shape[2:]) == f"{torch.Size([17, 19])}",
    "text of a half": lambda x: f"{x.shape[2] / 2:.1f}" == "8.5",
    "rank": lambda x: isinstance(x.shape, tuple) and x.shape[-1] == 19,
}


@pytest.mark.parametrize("asks", every(8, ASKED.values()))
def test_a_size_is_of_its_class_and_found_by_its_value(asks):
    def forward(self, x):
        y = self.a(x).relu()
        return self.b(y * 2 if asks(x) else y)

    model = network(forward)
    for images, others in ((IMAGES, ODD), (ODD, IMAGES)):
        converted = qrecipe.quantize(model, RECIPE, [images] * 2, progress=silent)
        for given in (images, images[:1]):
            assert sqnr_db(model(given), converted(given)) > 25
        with pytest.raises(AssertionError, match="inputs of other shapes than the example's"):
            converted(others)


def test_the_class_of_a_size_does_not_fix_it():
    def forward(self, x):
        size = x.shape[2:]
        assert isinstance(size, torch.Size)
        assert all(isinstance(each, int) for each in size)
        return self.b(F.interpolate(self.a(x).relu(), size=size))

    model = network(forward)
    converted = qrecipe.quantize(model, RECIPE, [IMAGES] * 2, progress=silent)
    assert sqnr_db(model(ODD), converted(ODD)) > 25


def test_a_message_does_not_fix_a_size():
    def forward(self, x):
        torch._assert(x.shape[2] > 1, f"{x.shape[2]} rows")
        if x.shape[1] != 3:
            raise ValueError(f"{x.shape} has no colours")
        return self.b(self.a(x).relu())

    model = network(forward)
    converted = qrecipe.quantize(model, RECIPE, [IMAGES] * 2, progress=silent)
    assert sqnr_db(model(ODD), converted(ODD)) > 25


def test_tensors_are_found_by_identity():
    def forward(self, x):
        y = self.a(x).relu()
        names = {x: "x", y: "y"}
        return self.b(y if names[y] == "y" and x in {x} else y * 2)

    model = network(forward)
    converted = qrecipe.quantize(model, RECIPE, [IMAGES] * 2, progress=silent)
    assert sqnr_db(model(ODD), converted(ODD)) > 25


OVER_THE_BATCH = {
    "loop": lambda self, x: torch.cat([self.body(row[None]) for row in x]),
    "length": lambda self, x: torch.cat([self.body(x[i : i + 1]) for i in range(len(x))]),
    "number": lambda self, x: self.body(x).flatten(1) * int(x.shape[0]),
    "key": lambda self, x: self.body(x) if x.shape[0] in {4} else self.body(x) * 2,
    "parts": lambda self, x: torch.cat([self.body(row) for row in x.split(1)]),
}


@pytest.mark.parametrize("forward", every(2, OVER_THE_BATCH.values()))
def test_what_depends_on_the_batch_size_is_not_fixed_to_it(forward):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    model = net_of(forward, body=body)
    with pytest.raises(TraceError, match="QR305") as found:
        qrecipe.plan(model, RECIPE, IMAGES)
    (finding,) = found.value.findings
    assert finding.message.endswith(
        "Python needs a number that follows from the batch size, to which a graph would be fixed; "
        "x.shape[0] can be computed with, but not x in a loop, len(), range() or int()"
    )
    assert finding.hint == 'trace the parts that can be traced: [fx] roots = ["body"]'
    cured = recipe_of_roots(["body"])
    converted = qrecipe.quantize(model, cured, [IMAGES] * 2, progress=silent)
    for images in (IMAGES, IMAGES[:2]):
        assert sqnr_db(model(images), converted(images)) > 25


def test_the_first_size_can_be_computed_with_where_len_cannot():
    model = network(lambda self, x: self.b(self.a(x).relu() * len(x)))
    with pytest.raises(TraceError, match=r"x.shape\[0\] can be computed with, but not x in"):
        qrecipe.plan(model, RECIPE, IMAGES)
    model = network(lambda self, x: self.b(self.a(x).relu() * x.shape[0]))
    converted = qrecipe.quantize(model, RECIPE, [IMAGES] * 2, progress=silent)
    assert sqnr_db(model(IMAGES[:2]), converted(IMAGES[:2])) > 25


def test_a_size_in_range_is_refused_with_a_cure_that_works():
    def counts(self, x, number):
        y = self.a(x).relu()
        for _ in range(number(y.shape[2]) // 8):
            y = y * 2
        return self.b(y)

    with pytest.raises(TraceError, match=r"int\(\) makes it one"):
        qrecipe.plan(network(lambda self, x: counts(self, x, lambda size: size)), RECIPE, IMAGES)
    plan = qrecipe.plan(network(lambda self, x: counts(self, x, int)), RECIPE, IMAGES)
    assert plan["a"].verdict == "quantized"


def test_shapes_of_a_file_cannot_make_forward_work_without_end(monkeypatch):
    for module in ("tracer", "caches"):
        monkeypatch.setattr(f"qrecipe.model.{module}.MOST_OPERATIONS", 500)

    def loops(self, x):
        for _ in range(int(x.shape[1])):
            x = self.fc(x)
        self.cache = x
        return x

    model = net_of(loops, fc=nn.Linear(4, 4))

    def part(steps):
        shapes = {"x": Shape(shape=(1, steps, 4), dtype="float32")}
        return TracedPart(path="", constants={}, nodes=(), shapes=shapes)

    with pytest.raises(TraceError, match="QR305"):
        trace(Subject.recorded(model, part(2**24), FxTable()))
    assert with_caches_without_values(model, [part(2**24)]) is None
    graph = trace(Subject.recorded(model, part(9), FxTable())).graph_module
    assert graph(torch.ones(1, 9, 4)).shape == (1, 9, 4)
    assert with_caches_without_values(model, [part(9)]) is not None


def test_the_process_is_as_before():
    before = torch.zeros
    qrecipe.plan(network(_star), RECIPE, IMAGES)
    assert torch.zeros is before
    with torch.device("meta"):
        assert torch.zeros(2).is_meta


def _joined(parts):
    return torch.cat([part.relu() for part in parts], 1)


def _halves(x):
    half = x.size(1) // 2
    return x.split([half, x.size(1) - half], 1)


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Tanh()])
def test_fewer_chunks_than_the_example_gave_are_an_error_with_the_site(layer):
    model = net_of(lambda self, x: _joined(self.layer(x).chunk(3, 1)), layer=layer)
    rows = torch.randn(2, 6, 8)
    converted = qrecipe.quantize(model, RECIPE, [rows] * 2, progress=silent)
    assert sqnr_db(model(rows), converted(rows)) > 25
    with pytest.raises(AssertionError, match="example's: :chunk gives 2 chunks"):
        converted(torch.randn(2, 4, 8))


def test_an_assertion_names_the_line_and_a_stored_model_does_not_depend_on_it(tmp_path):
    code = "def forward(self, x):\n    return self.b(self.a(x) * int(x.shape[2]))\n"
    found = []
    for folder in ("here", "there"):
        path = tmp_path / folder / "net.py"
        path.parent.mkdir()
        path.write_text("\n" * len(found) + code)
        names: dict[str, object] = {}
        exec(compile(path.read_text(), str(path), "exec"), names)
        found.append((network(names["forward"]), f"net.py:{2 + len(found)}"))
    (model, line), (other, other_line) = found
    converted = qrecipe.quantize(model, RECIPE, [IMAGES] * 2, progress=silent)
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", other)
    for candidate, at in ((converted, line), (loaded, other_line)):
        with pytest.raises(AssertionError, match=rf"for 16 here \(at .*{at} `return self.b"):
            candidate(ODD)


PARTS_BY_SIZE = {
    "chunk": lambda x: torch.chunk(x, x.shape[1], dim=1),
    "chunk method": lambda x: x.chunk(x.shape[1] // 2, 1),
    "tensor_split": lambda x: x.tensor_split(x.size(1), 1),
    "sizes": lambda x: x.split([1] * x.size(1), 1),
    "halves": _halves,
}


@pytest.mark.parametrize("name", every(2, PARTS_BY_SIZE))
def test_as_many_parts_as_a_size_says_are_not_read_at_another_size(name):
    parts = PARTS_BY_SIZE[name]
    model = net_of(lambda self, x: _joined(parts(self.a(x))), a=nn.Linear(8, 8))
    rows, more = torch.randn(2, 6, 8), torch.randn(2, 10, 8)
    converted = qrecipe.quantize(model, "builtin:x86-dynamic", example_inputs=rows)
    assert sqnr_db(model(rows), converted(rows)) > 25
    if name == "halves":  # are two at any size
        assert sqnr_db(model(more), converted(more)) > 25
    else:
        with pytest.raises(AssertionError, match="traced for"):
            converted(more)
