"""A cache that a model fills on its first call is no state; it is filled before tracing."""

from __future__ import annotations

import pytest
import torch
from routed import recipe_of_roots
from runs import STATIC, silent
from shares import every
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import PlanError
from qrecipe.model.caches import with_caches_filled
from qrecipe.model.call import Inputs

TOKENS = torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore::qrecipe.QRecipeWarning")


class Biased(nn.Module):
    """Attention whose bias is looked up on the first call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(17))
        index = torch.arange(9)
        self.register_buffer("index", index[:, None] - index[None] + 8)
        self.cache = self.cold()

    def cold(self):
        return None

    def bias(self, x):
        if self.cache is None:
            self.cache = self.table[self.index]
        return self.cache

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.transpose(1, 2) + self.bias(x)).softmax(-1) @ v)


class ByDevice(Biased):
    def cold(self):
        return {}

    def bias(self, x):
        key = str(x.device)
        if key not in self.cache:
            self.cache[key] = self.table[self.index]
        return self.cache[key]


class Buffered(Biased):
    def cold(self):
        self.register_buffer("grid", None, persistent=False)

    def bias(self, x):
        if self.grid is None:
            self.grid = torch.linspace(0, 1, int(x.shape[1]))
        return self.grid


class Listed(Biased):
    """Without the cache it cannot be traced: it asks for the size of its input."""

    def cold(self):
        return []

    def bias(self, x):
        if not self.cache:
            self.cache.append(torch.arange(int(x.shape[1])) / 9)
        return self.cache[0]


class Grid(Biased):
    """With and without its cache it can be traced, as two graphs."""

    def bias(self, x):
        if self.cache is None:
            self.cache = torch.arange(x.shape[1]) / 9
        return self.cache


class Cleared(ByDevice):
    """Clears its cache whenever its mode is set, to eval mode too."""

    def train(self, mode=True):
        self.cache = {}
        return super().train(mode)


KINDS = (Biased, ByDevice, Buffered, Listed, Grid, Cleared)


@pytest.mark.parametrize("kind", every(3, KINDS))
def test_a_model_that_fills_a_cache_is_quantized_before_and_after_its_first_call(kind):
    cold, warm = kind().eval(), kind().eval()
    warm(TOKENS)
    for model in (cold, warm):
        converted = qrecipe.quantize(model, STATIC, [TOKENS] * 2, progress=silent)
        assert sqnr_db(warm(TOKENS), converted(TOKENS)) > 20
    assert not (cold.grid if kind is Buffered else cold.cache)


class Flagged(Biased):
    """With a flag, and a buffer that has a size only after the first call."""

    def cold(self):
        self.initialized = False
        self.register_buffer("table_of_biases", torch.empty(0), persistent=False)

    def bias(self, x):
        if not self.initialized:
            self.table_of_biases = self.table[self.index]
            self.initialized = True
        return self.table_of_biases


class BySize(Biased):
    """By size in a dict, or of another size than before."""

    def cold(self):
        return {}

    def bias(self, x):
        size = x.shape[1]
        if size not in self.cache:
            self.cache[size] = torch.arange(size) / 9
        return self.cache[size]


class Resized(Biased):
    def bias(self, x):
        if self.cache is None or self.cache.shape[0] != x.shape[1]:
            self.cache = torch.arange(x.shape[1]) / 9
        return self.cache


@pytest.mark.parametrize("kind", every(6, [*KINDS, Flagged, BySize, Resized]))
def test_it_makes_no_difference_whether_and_when_the_model_has_run(kind, tmp_path):
    model, warm = kind().eval(), kind().eval()
    warm(TOKENS)
    cold_plan = qrecipe.plan(model, STATIC, TOKENS)
    assert cold_plan == qrecipe.plan(warm, STATIC, TOKENS)
    files = []
    for given in (model, warm):
        converted = qrecipe.quantize(given, STATIC, [TOKENS] * 2, progress=silent)
        files.append(tmp_path / f"{len(files)}.safetensors")
        qrecipe.save_quantized(converted, files[-1])
        for fresh in (kind().eval(), warm, kind().eval().to("meta")):
            loaded = qrecipe.load_quantized(files[-1], fresh)
            assert torch.equal(loaded(TOKENS), converted(TOKENS))
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_cache_in_a_root_is_filled_and_one_around_it_is_the_models_own(tmp_path):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = Biased(), 0

        def forward(self, x):
            self.calls += 1
            return self.inner(x) if x.isfinite().all() else x

    model = Around().eval()
    converted = qrecipe.quantize(model, recipe_of_roots(["inner"]), [TOKENS] * 2, progress=silent)
    assert model.calls == 0
    assert model.inner.cache is None
    file = tmp_path / "model.safetensors"
    qrecipe.save_quantized(converted, file)
    loaded = qrecipe.load_quantized(file, Around().eval())
    assert torch.equal(loaded(TOKENS), converted(TOKENS))


class Counting(Biased):
    def bias(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return 0


class Last(Biased):
    def bias(self, x):
        self.cache = x
        return 0


class FirstBatch(Biased):
    """Normalises by the first batch that it sees."""

    def bias(self, x):
        if self.cache is None:
            self.cache = x.mean()
        return self.cache


@pytest.mark.parametrize("kind", [Counting, Last, FirstBatch])
def test_what_is_written_on_each_call_or_depends_on_the_data_is_no_cache(kind):
    assert with_caches_filled(kind().eval(), {"": Inputs((TOKENS,))}) is None
    with pytest.raises(PlanError, match="QR306 the model's forward writes to"):
        qrecipe.plan(kind().eval(), STATIC, TOKENS)


def test_a_model_without_a_cache_has_none_to_fill():
    assert with_caches_filled(nn.Linear(16, 4).eval(), {"": Inputs((TOKENS,))}) is None


class Made(nn.Module):
    """Makes its layer on the first call, when it knows the number of features."""

    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(16, 8), None

    def made(self, features):
        return nn.Linear(features, 4)

    def forward(self, x):
        x = self.first(x)
        if self.layer is None:
            self.layer = self.made(x.shape[-1])
        return self.layer(x)


class Registered(Made):
    def __init__(self):
        super().__init__()
        del self.layer
        self.register_module("layer", None)


class Lazy(Made):
    def __init__(self):
        super().__init__()
        self.layer = nn.LazyLinear(4)


class Normalised(Made):
    """Its layer has no random weights."""

    def made(self, features):
        return nn.LayerNorm(features)


@pytest.mark.parametrize("kind", [Made, Registered, Lazy, Normalised])
@pytest.mark.parametrize("base", every(2, ["x86-static", "x86-dynamic"]))
def test_layers_of_the_first_call_are_loaded_into_a_model_that_never_ran(kind, base, tmp_path):
    model, file = kind().eval(), tmp_path / "model.safetensors"
    model(TOKENS)
    recipe = qrecipe.load_recipe(f"builtin:{base}")
    converted = qrecipe.quantize(model, recipe, [TOKENS] * 2, progress=silent)
    qrecipe.save_quantized(converted, file)
    fresh = kind().eval()
    for given in (fresh, model, fresh):
        assert torch.equal(qrecipe.load_quantized(file, given)(TOKENS), converted(TOKENS))
    assert kind is Lazy or getattr(fresh, "layer", None) is None


def test_layers_of_the_first_call_are_made_before_it_if_nothing_is_random(tmp_path):
    model, file = Normalised().eval(), tmp_path / "model.safetensors"
    converted = qrecipe.quantize(model, STATIC, [TOKENS] * 2, progress=silent)
    assert model.layer is None
    qrecipe.save_quantized(converted, file)
    loaded = qrecipe.load_quantized(file, Normalised().eval())
    assert torch.equal(loaded(TOKENS), converted(TOKENS))


@pytest.mark.parametrize("base", ["x86-static", "x86-dynamic"])
def test_random_layers_of_the_first_call_are_asked_for(base):
    model = Made().eval()
    with pytest.raises(PlanError, match='with random weights on its first call: "layer"') as found:
        qrecipe.plan(model, qrecipe.load_recipe(f"builtin:{base}"), TOKENS)
    assert found.value.findings[0].hint == "run the model once on an example first"
    model(TOKENS)
    assert len(qrecipe.plan(model, qrecipe.load_recipe(f"builtin:{base}"), TOKENS)) == 2


class Chosen(nn.Module):
    """Cannot be traced, and makes its layer on the first call."""

    def __init__(self):
        super().__init__()
        self.first, self.layers = nn.Linear(16, 8), nn.ModuleDict()

    def forward(self, x):
        x = self.first(x)
        if not x.isfinite().all():
            return x
        if "own" not in self.layers:
            self.layers["own"] = nn.Linear(8, 4)
        return self.layers["own"](x)


def test_what_no_graph_knows_is_loaded_after_a_first_call(tmp_path):
    model, file = Chosen().eval(), tmp_path / "model.safetensors"
    model(TOKENS)
    recipe = qrecipe.load_recipe("builtin:x86-dynamic")
    converted = qrecipe.quantize(model, recipe, [TOKENS] * 2, progress=silent)
    qrecipe.save_quantized(converted, file)
    fresh = Chosen().eval()
    with pytest.raises(qrecipe.ArtifactError, match="on its first call, run it once on an example"):
        qrecipe.load_quantized(file, fresh)
    fresh(TOKENS)
    assert torch.equal(qrecipe.load_quantized(file, fresh)(TOKENS), converted(TOKENS))
