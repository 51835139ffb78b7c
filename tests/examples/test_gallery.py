"""The gallery: a recipe for each architecture, without findings, that plans without a warning."""

from __future__ import annotations

import importlib
import sys

import pytest
from corpus import missing
from places import ROOT
from shares import every
from typer.testing import CliRunner

import qrecipe
from qrecipe.cli.app import app

FOLDER = ROOT / "examples" / "gallery"
RECIPES = sorted(FOLDER.glob("*.toml"))
SEQUENCES = ("language_model", "transformer_encoder")


@pytest.fixture(scope="module", autouse=True)
def _importable():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))
    for name in ("architectures", "gallery", "sequence_nets"):
        sys.modules.pop(name, None)


def test_every_recipe_is_without_findings_and_every_architecture_has_one():
    result = CliRunner().invoke(app, ["check", "--strict", *map(str, RECIPES)])
    assert (result.exit_code, result.output) == (0, "10 recipes checked: no errors\n")
    factories = importlib.import_module("architectures").FACTORIES
    assert [recipe.stem for recipe in RECIPES] == sorted(factories)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_what_a_recipe_leaves_float_has_a_reason(recipe):
    rules = qrecipe.load_recipe(recipe).rules
    own = [rule for rule in rules if rule.location.file == str(recipe)]
    assert all(rule.reason for rule in own if rule.qconfig is None)


@pytest.mark.parametrize("name", every(2, SEQUENCES, first=1))
def test_the_nets_of_sequences_plan_and_are_measured(name, monkeypatch):
    gallery = importlib.import_module("gallery")
    monkeypatch.setattr(gallery, "TIMED_RUNS", 1)
    assert plan(name).warnings == ()
    figures = gallery.measured(name)
    assert figures.boundaries == 0
    assert figures.float_size > 3 * figures.quantized_size
    assert figures.sqnr_db > 30
    assert gallery.row(name, figures).startswith(name)


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
@pytest.mark.parametrize(
    "name", [recipe.stem for recipe in RECIPES if recipe.stem not in SEQUENCES]
)
def test_every_recipe_plans_on_its_architecture_without_a_warning(name):
    planned = plan(name)
    assert planned.warnings == ()
    own = [rule for rule in planned.rules if str(FOLDER) in rule.location.file]
    assert [rule for rule in own if rule.verdict != "applied"] == []


def plan(name):
    model, example_inputs = importlib.import_module("architectures").FACTORIES[name]()
    return qrecipe.plan(model, FOLDER / f"{name}.toml", example_inputs)
