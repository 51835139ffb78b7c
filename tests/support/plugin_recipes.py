"""Recipes that name observers of plugins, and what is found about them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qrecipe
from qrecipe.errors.findings import PluginError, QRecipeError

RECIPE = """\
format = 1
extends = "builtin:x86-static"
[tensor.activation]
observer = {observer}
"""
ARGUMENTS = """
import qrecipe
from pydantic import BaseModel, Field, field_validator
from torch.ao.quantization.observer import MinMaxObserver

class Options(BaseModel, extra="forbid"):
    share: float = Field(default=0.9, gt=0, le=1)
    names: dict[str, int] = {}
    odd: int = 0

    @field_validator("odd")
    @classmethod
    def check(cls, value):
        if value == 13:
            raise RuntimeError("unlucky")
        return value

@qrecipe.register_observer("opted", options=Options)
class Opted(MinMaxObserver):
    def __init__(self, share=0.9, names=None, odd=0, **spec):
        super().__init__(**spec)

@qrecipe.register_observer("plain")
class Plain(MinMaxObserver):
    def __init__(self, share: float = 0.9, **spec):
        super().__init__(**spec)
        if share < 0:
            raise ValueError("share is negative")
        if share == 0:
            raise SystemExit("no share")
"""


def recipe_with(observer: str) -> qrecipe.Recipe:
    return qrecipe.parse_recipe(RECIPE.format(observer=observer))


def plan_with(observer: str) -> qrecipe.Plan:
    return qrecipe.plan(model(), recipe_with(observer), torch.rand(2, 4))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()


def refused(observer: str, error: type[QRecipeError] = PluginError) -> qrecipe.Finding:
    """The only finding about a recipe, which stands under its line 4."""
    with pytest.raises(error) as caught:
        plan_with(observer)
    (finding,) = caught.value.findings
    assert (finding.location.file, finding.location.line) == ("<recipe>", 4)
    return finding


def under_caret(finding: qrecipe.Finding) -> str:
    at = finding.location
    return at.source[at.column - 1 : at.end_column - 1]
