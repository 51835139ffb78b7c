"""A model with an attribute of every kind, and whether it is as it was."""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from artifacts import recipe
from nets import NETS, Mlp
from torch import fx, nn

import qrecipe

_UNEQUAL = torch.tensor([1.0, 64.0, 1.0, 1.0, 1.0, 1.0])
"""Factors of the features, so that there is something to smooth."""

OF_MODULES = sorted({*dir(nn.Module()), *dir(fx.GraphModule(nn.Module(), fx.Graph()))})
"""Every name that torch gives to modules and to graph modules."""


SMOOTH = """
[rules.module_name]
fc1 = "float"
fc2 = "dynamic"
[transform.smooth]
alpha = 0.5
"""


class Guarded(Mlp):
    """A model with an attribute of every kind; its property and its method must not be run."""

    KINDS = ("a", "b")
    LEVELS: ClassVar = [[1], [2]]

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gain = nn.Parameter(torch.full((4,), 7.0))
        self.register_buffer("offset", torch.ones(4))
        self.class_names = ["cat", "dog"]
        self.spare = nn.Linear(2, 2)
        self.notes = {"gains": [self.gain]}
        self.register_forward_hook(_passed)
        self.fc1.register_forward_pre_hook(_seen)

    @property
    def boom(self):
        raise AssertionError("a property of the model was run")

    def helper(self):
        raise AssertionError("a method of the model was run")

    def forward(self, x):
        return super().forward(x).abs() * self.gain + self.offset


def _passed(module, args, output):
    return output


def _seen(module, args):
    return None


def objects_of(value):
    """Everything in a model that can be changed, by identity."""
    found, left = {}, [value]
    while left:
        each = left.pop()
        if id(each) in found or not isinstance(each, (nn.Module, torch.Tensor, dict, list)):
            continue
        found[id(each)] = each
        if isinstance(each, nn.Module):
            left.append(vars(each))
        elif not isinstance(each, torch.Tensor):
            left += each.values() if isinstance(each, dict) else each
    return found


def state_of(net):
    """Every value in it, to be compared later."""
    tensors = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return tensors, repr(net), sorted(vars(net)), net.training, dict(net._forward_hooks)


def assert_unchanged(net, before):
    for name, tensor in before[0].items():
        assert torch.equal(net.state_dict()[name], tensor), name
    assert list(net.state_dict()) == list(before[0])
    assert state_of(net)[1:] == before[1:]


def store_guarded(path, rules=""):
    """A sound file of the model, quantized; by the rules of ``SMOOTH`` with a product."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the hooks
        batches = [batch * _UNEQUAL for batch in NETS["mlp"].batches()]
        converted = qrecipe.quantize(Guarded().eval(), recipe(rules), batches, progress=False)
    qrecipe.save_quantized(converted, path)
    return path
