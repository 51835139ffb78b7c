"""Tensors that have to share a scale share one observer, through any chain of operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from plans import net_of
from runs import silent
from torch import nn

import qrecipe
from qrecipe.audit.sqnr import sqnr_db


def taken_over():
    def forward(self, x):
        y, wide, other = self.a(x), self.b(x), self.c(x)
        first = torch.cat([F.max_pool2d(y, 3, 1, 1), wide], 1)
        second = torch.cat([other, y], 1)
        return self.d(first) + self.e(second)

    torch.manual_seed(0)
    net = net_of(
        forward,
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(3, 4, 1),
        c=nn.Conv2d(3, 4, 1),
        d=nn.Conv2d(8, 4, 1),
        e=nn.Conv2d(8, 4, 1),
    )
    with torch.no_grad():
        net.b.weight.mul_(10)
    return net


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(12)]


def test_a_cat_whose_input_another_cat_takes_over_is_not_clipped():
    model = taken_over()
    recipe = qrecipe.parse_recipe(
        'format = 1\nextends = "builtin:x86-static"\n[lint]\nignore = ["QR206"]\n'
        '[tensor.activation]\nobserver = "minmax"'
    )
    converted = qrecipe.quantize(model, recipe, batches(), progress=silent)
    assert sqnr_db(model(batches()[0]), converted(batches()[0])) > 20


def test_all_tensors_that_cats_connect_have_one_observer():
    compiled = qrecipe.compile(taken_over(), "builtin:x86-static", batches()[0])
    prepared = compiled.prepare()
    names = {node.name: node for node in prepared.graph.nodes}
    observers = {
        name: prepared.get_submodule(next(iter(names[name].users)).target)
        for name in ("a", "b", "c", "cat", "cat_1", "max_pool2d")
    }
    assert len({id(observer) for observer in observers.values()}) == 1
