"""Copies of models: what deepcopy would do, in less time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qrecipe.model.copies import copy_around, runnable_copy, structural_copy


class Itself(nn.Linear):
    """Copies itself, and looks at what is inside."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.inner = nn.Linear(4, 4)
        self.copies = 0

    def __deepcopy__(self, memo):
        made = Itself()
        made.inner = copy.deepcopy(self.inner, memo)
        assert made.inner.in_features == 4
        made.copies = self.copies + 1
        return made


class Reduced(nn.Linear):
    def __getstate__(self):
        return {**vars(self), "restored": True}


class Restored(nn.Linear):
    def __setstate__(self, state):
        super().__setstate__({**state, "restored": True})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.alias = self.layer
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.layer.weight
        self.itself, self.reduced, self.restored = Itself(), Reduced(4, 4), Restored(4, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.norm = nn.BatchNorm1d(4)
        self.table = {"layer": self.layer}
        self.twice = [self.table, self.table]
        self.owner = [self]
        self.hook = self.layer.register_forward_hook(self.note)

    def note(self, *call):
        self.noted = True

    def forward(self, x):
        return self.norm(self.itself(self.tied(self.layer(x))))


@pytest.mark.parametrize("copied", [structural_copy, runnable_copy])
def test_a_copy_is_what_deepcopy_would_make(copied):
    model = Net().eval()
    made = copied(model)
    whole = copy.deepcopy(model)
    for path, module in whole.named_modules(remove_duplicate=False):
        own = made.get_submodule(path)
        assert type(own).__name__ == type(module).__name__
        assert list(vars(own)) == list(vars(module))
    assert not set(made.modules()) & set(model.modules())
    assert made.alias is made.layer is made.table["layer"]
    assert made.twice[0] is made.twice[1] is made.table
    assert made.owner == [made]
    assert made.itself.copies == 1
    assert made.reduced.restored
    assert made.restored.restored
    assert made.layer.weight is made.tied.weight is model.layer.weight
    assert (made.norm.running_mean is model.norm.running_mean) is (copied is structural_copy)
    x = torch.randn(2, 4)
    assert torch.equal(made.tied(made.layer(x)), model.tied(model.layer(x)))
    assert made.noted


def test_what_cannot_be_copied_in_a_part_that_is_shared_is_no_obstacle():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    model[0][0].stream = (each for each in range(3))
    assert copy_around(model, ["0"])[0] is model[0]
