"""Recipes that extend each other, on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from qrecipe.errors.findings import RecipeError
from qrecipe.recipe.recipe import Recipe, load_recipe

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


def install(
    site: Path,
    monkeypatch,
    value: str,
    *,
    files: bool = True,
    editable: Path | None = None,
    version: str = "1.0",
) -> Path:
    """A distribution ``acme-recipes`` that publishes ``cnn`` from the given package."""
    info = site / f"acme_recipes-{version}.dist-info"
    info.mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: acme-recipes\nVersion: {version}\n"
    (info / "METADATA").write_text(metadata)
    (info / "entry_points.txt").write_text(f"[qrecipe.recipes]\ncnn = {value}\n")
    record = "acme/vision/cnn.toml,,\nacme/vision/base.toml,,\nacme/secret.toml,,\n"
    (info / "RECORD").write_text(record if files else "")
    if editable is not None:
        url = f'{{"url": "{editable.as_uri()}", "dir_info": {{"editable": true}}}}'
        (info / "direct_url.json").write_text(url)
    package = (editable / "src" if editable else site) / "acme" / "vision"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "base.toml").write_text(BASE)
    (package / "cnn.toml").write_text('extends = "./base.toml"\nname = "cnn"\n')
    monkeypatch.syspath_prepend(str(site))
    return package
