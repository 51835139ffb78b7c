"""Texts that the tests of recipes start from."""

from __future__ import annotations

import pytest

from qrecipe.errors.findings import RecipeError
from qrecipe.recipe.recipe import parse_recipe

HEAD = """\
format = 1
backend = "x86"
rules.global = "float"
"""
WEIGHT = """\
[tensor.weight]
observer = "per_channel_minmax"
dtype = "int8"
qscheme = "per_channel_symmetric"
"""
ACTIVATION = """\
[tensor.activation]
observer = "minmax"
dtype = "uint8"
qscheme = "per_tensor_affine"
"""
INT8 = '[qconfig.int8]\nweight = "weight"\nactivation = "activation"\n'
FULL = HEAD + WEIGHT + ACTIVATION + INT8


def findings_of(text: str):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "recipes/cnn.toml")
    return caught.value.findings


def marked(finding) -> str:
    """The text under the caret."""
    return finding.location.source[finding.location.column - 1 : finding.location.end_column - 1]
