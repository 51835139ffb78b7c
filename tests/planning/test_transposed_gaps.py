"""Transposed convolutions whose stride skips results, which onednn does not write."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db

LINT = '[lint]\nignore = ["QR208", "QR221"]\n'
TEXT = 'format = 1\nextends = "builtin:x86-static"\nbackend = "{}"\n' + LINT


def gapped(seed):
    torch.manual_seed(seed)
    layers = nn.ConvTranspose2d(32, 32, (1, 4), stride=(3, 2), groups=32), nn.Conv2d(32, 4, 1)
    return nn.Sequential(*layers).eval(), [torch.randn(2, 32, 7, 6) for _ in range(10)]


@pytest.mark.cpu
@pytest.mark.parametrize("backend", ["x86", "fbgemm", "onednn"])
def test_what_a_stride_skips_is_written_by_fbgemm_or_left_float(backend):
    for seed in range(3):
        model, batches = gapped(seed)
        recipe = qrecipe.parse_recipe(TEXT.format(backend))
        site = qrecipe.plan(model, recipe, batches[0]).sites[0]
        found = qrecipe.quantize(model, recipe, batches)
        assert (site.verdict == "float") == (backend == "onednn")
        assert sqnr_db(model(batches[0]), found(batches[0])) > 25
