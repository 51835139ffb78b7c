"""A model that is traced in parts: control flow around two modules."""

from __future__ import annotations

from torch import nn

import qrecipe


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x):
        return self.relu(self.norm(self.conv(x)))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x, *, scale=1.0):
        return self.fc2(self.fc1(x).relu())


class Routed(nn.Module):
    """Control flow around two parts that can be traced."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head, self.other = Body(), Head(), nn.Linear(4, 4)

    def forward(self, x):
        y = self.backbone(x).mean((2, 3))
        if y.sum() > 1e9:
            y = y * 2
        return self.other(self.head(y, scale=1.0))


def recipe_of_roots(roots, rules=""):
    listed = ", ".join(f'"{root}"' for root in roots)
    return qrecipe.parse_recipe(
        'format = 1\nextends = "builtin:x86-static"\n'
        f"[fx]\nroots = [{listed}]\n[rules.module_name]\n{rules}"
    )
