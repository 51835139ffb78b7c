"""Inputs of several roots are several tensors, whatever they are called."""

from __future__ import annotations

import torch
from plans import net_of
from runs import silent
from torch import fx, nn

import qrecipe

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
RULES = """
format = 1
extends = "builtin:x86-static-minmax"
fx.roots = ["a", "b"]
lint.ignore = ["QR208"]
[tensor.wide]
observer = "minmax"
dtype = "quint8"
qscheme = "per_tensor_affine"
reduce_range = true
eps = 0.01
[qconfig.wide]
weight = "weight"
activation = "wide"
[rules.module_name]
"b" = "wide"
"""


def routed():
    def forward(self, x):
        y = self.a(x)
        return self.b(y if y.isfinite().all() else x)

    torch.manual_seed(0)
    return net_of(forward, a=nn.Sequential(nn.Linear(6, 6)), b=nn.Sequential(nn.Linear(6, 6)))


def test_each_is_quantized_on_its_own_and_with_its_own_scheme():
    recipe = qrecipe.parse_recipe(RULES)
    plan = qrecipe.plan(routed(), recipe, X)
    converted = qrecipe.quantize(routed(), recipe, [X] * 10, progress=silent)
    targets = [
        node.target
        for part in converted.modules()
        if isinstance(part, fx.GraphModule)
        for node in part.graph.nodes
    ]
    ran = targets.count(torch.quantize_per_tensor) + targets.count("dequantize")
    assert plan.boundaries == ran == 4
