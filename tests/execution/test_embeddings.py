"""Indices of quantized embeddings in any layout: their kernels take contiguous ones alone."""

from __future__ import annotations

import pytest
import torch
from runs import silent
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db

LAYOUTS = {
    "slice": lambda ids: ids[:, :4],
    "column": lambda ids: ids[:, 0],
    "every_second": lambda ids: ids[:, ::2],
    "expand": lambda ids: ids[:1].expand(3, -1),
    "transpose": lambda ids: ids.t(),
}
BYTES = qrecipe.load_recipe("builtin:embedding-weight-only")
FOUR_BITS = qrecipe.parse_recipe(
    'format = 1\nextends = "builtin:embedding-weight-only"\n'
    '[rules.module_type]\n"torch.nn.Embedding" = "embedding-4-bit"\n'
)


class Net(nn.Module):
    def __init__(self, layout, traced=True):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layout, self.traced = nn.Embedding(30, 8), layout, traced

    def forward(self, ids):
        if not self.traced and int(ids.sum()) < 0:
            return ids
        return self.table(self.layout(ids))


class Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.EmbeddingBag(30, 8, mode="sum")

    def forward(self, ids, starts):
        return self.table(ids[:, 0], offsets=starts[::2])


def ids():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 30, (4, 8), generator=generator)


@pytest.mark.parametrize(
    ("traced", "recipe"),
    [
        (True, BYTES),
        pytest.param(True, FOUR_BITS, marks=pytest.mark.slow),
        (False, BYTES),
    ],
    ids=["fx", "four_bits", "eager"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_indices_in_any_layout_are_looked_up(layout, traced, recipe, tmp_path):
    model = Net(LAYOUTS[layout], traced).eval()
    converted = qrecipe.quantize(model, recipe, [ids()], progress=silent)
    assert [site.mode for site in qrecipe.plan(model, recipe, ids()).sites] == ["weight_only"]
    found = converted(ids())
    assert sqnr_db(model(ids()), found) > (30 if recipe is BYTES else 15)
    qrecipe.save_quantized(converted, tmp_path / "m.safetensors")
    assert torch.equal(qrecipe.load_quantized(tmp_path / "m.safetensors", model)(ids()), found)


def test_torchs_kernel_refuses_indices_that_are_not_contiguous():
    table = torch.ao.nn.quantized.Embedding(30, 8)
    with pytest.raises(RuntimeError, match="contiguous"):
        table(ids()[:, :4])


def test_bags_take_indices_and_offsets_in_any_layout():
    torch.manual_seed(0)
    model, starts = Bags().eval(), torch.tensor([0, 1, 2, 3])
    converted = qrecipe.quantize(model, BYTES, [(ids(), starts)], progress=silent)
    assert sqnr_db(model(ids(), starts), converted(ids(), starts)) > 30
