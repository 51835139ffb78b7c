"""Recipes that extend each other, on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from qrecipe.errors import RecipeError
from qrecipe.recipe import Recipe, load_recipe

BASE = """
format = 1
backend = "x86"
[tensor.weight]
observer = { name = "histogram", bins = 512 }
dtype = "int8"
qscheme = "per_tensor_symmetric"
[tensor.activation]
observer = "minmax"
dtype = "uint8"
qscheme = "per_tensor_affine"
[qconfig.int8]
weight = "weight"
activation = "activation"
[rules]
global = "int8"
[rules.module_name]
"conv1" = { qconfig = "float", reason = "sensitive" }
"conv2" = "float"
"""


def write(folder: Path, **texts: str) -> Path:
    """Recipes by name, beside a file that marks the tree."""
    (folder / "pyproject.toml").touch()
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)
    return folder


def load(folder: Path, name: str, monkeypatch) -> Recipe:
    monkeypatch.chdir(folder)
    return load_recipe(f"{name}.toml")


def findings_of(folder: Path, name: str, monkeypatch, error=RecipeError):
    with pytest.raises(error) as caught:
        load(folder, name, monkeypatch)
    return caught.value.findings
