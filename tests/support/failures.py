"""What tests of bad input share."""

from __future__ import annotations

import torch
from nets import Mlp
from plans import ROWS, recipe
from torch.ao.quantization.observer import ObserverBase

import qrecipe
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


def observers(prepared):
    """All that the observers of a prepared model know."""
    return {
        name: {
            key: value.clone() if isinstance(value, torch.Tensor) else value
            for key, value in [*module.state_dict().items(), *vars(module).items()]
            if not key.startswith("_")
        }
        for name, module in prepared.named_modules()
        if isinstance(module, ObserverBase)
    }


def assert_equal_observers(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].keys() == two[name].keys()
        for key, value in one[name].items():
            other = two[name][key]
            same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
            assert same, f"{name}.{key}"


def prepared_mlp(text=""):
    compiled = qrecipe.compile(Mlp().eval(), recipe(text), ROWS)
    return compiled, compiled.prepare()
