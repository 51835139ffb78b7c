"""A cache that a model fills on its first call is no state; it is filled where a trace needs it."""

from __future__ import annotations

import pytest
import torch
from runs import STATIC, silent
from shares import every
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import ArtifactError, PlanError
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


KINDS = (Biased, ByDevice, Buffered, Listed, Grid)


@pytest.mark.parametrize("kind", every(2, KINDS))
def test_a_model_that_fills_a_cache_is_quantized_before_and_after_its_first_call(kind):
    cold, warm = kind().eval(), kind().eval()
    warm(TOKENS)
    for model in (cold, warm):
        converted = qrecipe.quantize(model, STATIC, [TOKENS] * 2, progress=silent)
        assert sqnr_db(warm(TOKENS), converted(TOKENS)) > 20
    assert not (cold.grid if kind is Buffered else cold.cache)


@pytest.mark.parametrize("kind", every(3, [ByDevice, Biased, Grid]))
def test_a_cache_that_a_graph_computes_needs_none_in_a_stored_model(kind, tmp_path):
    converted = qrecipe.quantize(kind().eval(), STATIC, [TOKENS] * 2, progress=silent)
    qrecipe.save_quantized(converted, tmp_path / "model.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "model.safetensors", kind().eval())
    assert torch.equal(loaded(TOKENS), converted(TOKENS))


@pytest.mark.parametrize("kind", [Buffered])
def test_a_cache_that_a_trace_needs_must_be_filled_before_a_stored_model_is_loaded(kind, tmp_path):
    converted = qrecipe.quantize(kind().eval(), STATIC, [TOKENS] * 2, progress=silent)
    file = tmp_path / "model.safetensors"
    qrecipe.save_quantized(converted, file)
    given = kind().eval()
    with pytest.raises(ArtifactError, match="fills a cache on its first call, run it once") as told:
        qrecipe.load_quantized(file, given)
    assert told.value.findings[0].code == "QR507"
    with torch.no_grad():
        given(TOKENS)
    assert torch.equal(qrecipe.load_quantized(file, given)(TOKENS), converted(TOKENS))


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
    assert with_caches_filled(kind().eval(), Inputs((TOKENS,))) is None
    with pytest.raises(PlanError, match="QR306 the model's forward writes to"):
        qrecipe.plan(kind().eval(), STATIC, TOKENS)


def test_a_model_without_a_cache_has_none_to_fill():
    assert with_caches_filled(nn.Linear(16, 4).eval(), Inputs((TOKENS,))) is None
