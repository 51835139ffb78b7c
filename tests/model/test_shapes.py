"""Python code with shapes is traced with those of the example, which the graph then asserts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from plans import net_of
from runs import silent
from shares import every
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import TraceError
from qrecipe.model.caches import with_caches_without_values
from qrecipe.model.record import Shape, TracedPart
from qrecipe.model.trace import trace
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


def test_what_depends_on_the_batch_size_is_not_fixed_to_it():
    with pytest.raises(TraceError, match="QR305"):
        qrecipe.plan(network(lambda self, x: [self.a(row[None]) for row in x]), RECIPE, IMAGES)


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
    given = {"x": Shape(shape=(1, 2**24, 4), dtype="float32")}
    with pytest.raises(TraceError, match="QR305"):
        trace(model, "", {}, FxTable(), given)
    assert (
        with_caches_without_values(
            model, [TracedPart(path="", constants={}, nodes=(), shapes=given)]
        )
        is None
    )
    given = {"x": Shape(shape=(1, 9, 4), dtype="float32")}
    assert trace(model, "", {}, FxTable(), given)[0](torch.ones(1, 9, 4)).shape == (1, 9, 4)
    assert (
        with_caches_without_values(
            model, [TracedPart(path="", constants={}, nodes=(), shapes=given)]
        )
        is not None
    )


def test_the_process_is_as_before():
    before = torch.zeros
    qrecipe.plan(network(_star), RECIPE, IMAGES)
    assert torch.zeros is before
    with torch.device("meta"):
        assert torch.zeros(2).is_meta
