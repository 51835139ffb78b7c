"""Models that cannot be pickled: a factory makes them in each worker."""

from __future__ import annotations

import pytest
import torch
from executors import AtOnce
from rankings import FEW, ranked
from runs import HEAD, silent
from torch import nn

import qrecipe
from qrecipe.errors.findings import ExecutionError


class Handle:
    """Can be copied, and not be pickled."""

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        raise TypeError("a handle of this process")


class Handled(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.linear = nn.Linear(6, width)
        self.handle = Handle()

    def forward(self, x):
        return self.linear(x)


def test_a_model_that_cannot_be_pickled_is_made_by_its_factory():
    model = Handled().eval()
    batches = [torch.randn(4, 6) for _ in range(2)]
    with pytest.raises(ExecutionError) as raised:
        ranked(model, batches, pool=AtOnce())
    assert str(raised.value) == (
        "QR426 model cannot be pickled for the workers: TypeError: a handle of "
        "this process\n"
        "  let each worker make it: pool=qrecipe.Pool(executor, factory=...)"
    )
    pool = qrecipe.Pool(AtOnce(), factory=Handled)
    assert ranked(model, batches, pool=pool) == ranked(model, batches)


class Chain(Handled):
    def __init__(self):
        super().__init__()
        self.second = nn.Linear(6, 6)

    def forward(self, x):
        return self.second(torch.relu(self.linear(x)))


def test_a_model_of_a_factory_is_not_transformed_twice():
    model, batches = Chain().eval(), [torch.randn(4, 6) for _ in range(2)]
    recipe = qrecipe.parse_recipe(f'{HEAD}[transform.equalize]\nby = "weights"\n{FEW}')
    pool = qrecipe.Pool(AtOnce(), factory=Chain)
    alone = ranked(model, batches, recipe)
    assert ranked(model, batches, recipe, pool=pool) == alone
    result = qrecipe.tune(
        model, recipe, batches, spread, max_drop=0.0, max_trials=2, progress=silent, pool=pool
    )
    plain = qrecipe.tune(
        model, recipe, batches, spread, max_drop=0.0, max_trials=2, progress=silent
    )
    metrics = [[trial.metric for trial in each.trials] for each in (result, plain)]
    assert metrics[0] == metrics[1]


def spread(model):
    with torch.no_grad():
        return -float(model(torch.linspace(-2, 2, 24).reshape(4, 6)).std())


def test_a_factory_that_makes_another_model_is_refused():
    pool = qrecipe.Pool(AtOnce(), factory=lambda: Handled(7))
    with pytest.raises(
        ExecutionError, match=r'QR427.*another model from factory.*"linear\.weight"'
    ):
        ranked(Handled().eval(), [torch.randn(4, 6)], pool=pool)


def test_a_factory_that_makes_no_model_is_refused():
    pool = qrecipe.Pool(AtOnce(), factory=lambda: (Handled(), torch.randn(4, 6)))
    with pytest.raises(ExecutionError, match=r"QR427.*a tuple from factory(?s:.)*the model alone"):
        ranked(Handled().eval(), [torch.randn(4, 6)], pool=pool)
