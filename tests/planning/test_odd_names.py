"""Modules whose names hold what patterns are written with: said as a rule, hinted, generated."""

from __future__ import annotations

import functools
from itertools import islice

import pytest
import torch
from plans import net_of
from runs import HEAD, silent
from shares import every
from torch import nn
from tuning import alike

import qrecipe
from qrecipe.errors.findings import UnmatchedRuleError

ODD = {"a[0]": "a0", "b*": "bc", "c?": "cd", "d{x,y}": "dx", "e]": "e", "f[": "f"}
"""Names, each with a neighbour that its letters read as a pattern could mean, or look like."""

FEW = '[lint]\nignore = ["QR207", "QR208"]\n'


class Net(nn.Module):
    def __init__(self, odd):
        super().__init__()
        names = [name for pair in odd.items() for name in pair]
        self.parts = nn.ModuleDict({name: nn.Linear(6, 6) for name in names})

    def forward(self, x):
        for part in self.parts.values():
            x = torch.relu(part(x))
        return x


def net(odd=ODD):
    torch.manual_seed(0)
    return Net(odd).eval()


BATCHES = [torch.randn(4, 6, generator=torch.Generator().manual_seed(n)) for n in range(10)]


def with_rules(rules):
    return qrecipe.parse_recipe(f"{HEAD}{FEW}[rules.module_name]\n{rules}")


def left_float(recipe):
    plan = qrecipe.plan(net(), recipe, BATCHES[0])
    return {site.name for site in plan.sites if site.verdict == "float"}


@functools.cache
def ranking():
    return qrecipe.sensitivity(net(), with_rules(""), BATCHES, progress=silent)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("a[[]0[]]", "a[0]"),
        ("b[*]", "b*"),
        ("c[?]", "c?"),
        ("d[{]x,y[}]", "d{x,y}"),
        ("e[]]", "e]"),
        ("f[[]", "f["),
    ],
)
def test_such_a_name_is_written_with_classes_of_one_letter_and_beats_a_glob(key, name):
    rules = f'"parts.{key}" = "float"\n"parts.*" = "int8"\n'
    assert left_float(with_rules(rules)) == {f"parts.{name}"}


def test_the_hint_for_a_name_that_is_no_pattern_of_itself_is_the_pattern_to_write():
    with pytest.raises(UnmatchedRuleError) as caught:
        left_float(with_rules('"parts.d{x,y}.more" = "float"'))
    assert "parts.d[{]x,y[}]" in str(caught.value)


@pytest.mark.parametrize("count", every(3, range(len(ODD) * 2 + 1)))
def test_an_overlay_leaves_float_just_what_was_ranked(count, tmp_path):
    worst = {site.name for site in ranking().sites[:count]}
    assert left_float(ranking().to_recipe(keep_float=count)) == worst
    ranking().save_overlay(tmp_path / "own.toml", count)
    assert left_float(tmp_path / "own.toml") == worst


def test_a_search_leaves_float_what_it_reports(monkeypatch):
    monkeypatch.setattr(
        "qrecipe.authoring.tune.tune.levers_of", lambda *args: ()
    )  # no other observers
    monkeypatch.setattr("qrecipe.authoring.tune.trials.ModelBench._priced", alike)

    def evaluate(candidate):
        """Good only where this one layer is float."""
        return float(not hasattr(candidate.get_submodule("parts.a[0]"), "scale"))

    model = net(dict(islice(ODD.items(), 2)))  # each site is a trial
    result = qrecipe.tune(model, with_rules(""), BATCHES, evaluate, max_drop=0, progress=silent)
    assert result.float_sites == ("parts.a[0]",)
    assert left_float(result.recipe) == {"parts.a[0]"}


def test_a_suggestion_means_the_sites_that_it_names():
    parts = nn.ModuleDict(
        {
            "a0": nn.Conv2d(3, 128, 3),
            "a[0]": nn.ConvTranspose2d(128, 128, 3, 2, 1, 1, groups=128),  # slower in int8
            "a1": nn.ConvTranspose2d(128, 8, 3),
        }
    )
    model = net_of(lambda self, x: nn.Sequential.forward(self.parts.values(), x), parts=parts)
    inputs = torch.randn(2, 3, 8, 8)
    recipe = qrecipe.suggest(model, inputs)
    plan = qrecipe.plan(model, recipe, inputs)
    by_name = [rule.key for rule in recipe.rules if rule.tier == "module_name"]
    assert by_name == ["parts.a[[]0[]]"]
    assert [site.name for site in plan.sites if site.verdict == "float"] == ["parts.a[0]"]


class Conversions(nn.Module):
    """Modules with the names of torch's own functions for quantizing."""

    def __init__(self):
        super().__init__()
        self.quantize_per_tensor = nn.Linear(6, 6)
        self.dequantize = nn.Linear(6, 6)

    def forward(self, x):
        return self.dequantize(torch.relu(self.quantize_per_tensor(x)))


def test_modules_called_as_torchs_conversions_are_sites_like_any_other():
    torch.manual_seed(0)
    model = Conversions().eval()
    converted = qrecipe.quantize(model, with_rules(""), BATCHES, progress=silent)
    report = qrecipe.compare(model, converted, BATCHES, progress=silent)
    sqnr = {site.name: site.activation.sqnr_db for site in report.sites}
    assert sqnr.keys() >= {"quantize_per_tensor", "dequantize"}
    assert min(sqnr.values()) > 20
