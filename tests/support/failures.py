"""What tests of bad input share."""

from __future__ import annotations

import torch

from qrecipe.errors.findings import CODES


def only(error, code):
    (finding,) = error.value.findings
    assert finding.code == code
    assert CODES[code].error is not None
    assert isinstance(error.value, CODES[code].error)
    return finding


def rows(count=10, width=6):
    """Batches for a model that takes rows."""
    return [torch.randn(4, width) for _ in range(count)]
