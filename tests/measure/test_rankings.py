"""What is done with a ranking: overlays, JSON, text and plots."""

from __future__ import annotations

import json
import math

import pytest
from nets import NETS
from rankings import FEW, STATIC, float_rules, ranked, ranking_of, sqnr_db
from runs import HEAD, silent

import qrecipe
from qrecipe.errors.findings import (
    ExecutionError,
    QRecipeError,
    QRecipeWarning,
    RecipeReferenceError,
)
from qrecipe.measure.sensitivity.ranking import RankedSite, Ranking


def test_the_overlay_leaves_the_worst_sites_float_and_says_why():
    net = NETS["residual"]
    model, batches = net.model(), net.batches(3)
    ranking = ranking_of("residual")
    overlay = ranking.to_recipe(keep_float=2)
    rules = float_rules(overlay)
    assert [rule.key for rule in rules] == [site.name for site in ranking.sites[:2]]
    assert rules[0].reason == f"{ranking.sites[0].sqnr_db:.1f} dB when quantized alone"
    assert rules[0].location.line < rules[1].location.line
    plan = {site.name: site for site in qrecipe.plan(model, overlay, batches[0]).sites}
    assert all(plan[rule.key].verdict == "float" for rule in rules)
    before = qrecipe.quantize(model, STATIC, batches, progress=silent)
    after = qrecipe.quantize(model, overlay, batches, progress=silent)
    assert sqnr_db(model, after, batches) > sqnr_db(model, before, batches)
    limit = ranking.sites[2].sqnr_db
    by_limit = float_rules(ranking.to_recipe(min_sqnr_db=limit))
    assert [rule.key for rule in by_limit] == [rule.key for rule in rules]
    assert float_rules(ranking.to_recipe(keep_float=0)) == []


def test_a_name_of_several_calls_is_written_with_its_number():
    ranking = ranking_of("shared_conv")
    overlay = ranking.to_recipe(keep_float=2)
    assert sorted(rule.key for rule in float_rules(overlay)) == ["conv#0", "conv#1"]
    net = NETS["shared_conv"]
    plan = qrecipe.plan(net.model(), ranking.to_recipe(keep_float=1), net.batches(1)[0])
    assert sum(site.verdict == "float" for site in plan.sites) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"keep_float": 1, "min_sqnr_db": 3},
        {"keep_float": -1},
        {"keep_float": "2"},
        {"keep_float": 1.5},
        {"min_sqnr_db": "20"},
        {"min_sqnr_db": math.nan},
    ],
)
def test_the_overlay_wants_one_measure_of_what_to_leave_float(arguments):
    with pytest.raises(ExecutionError, match="QR425"):
        ranking_of("mlp").to_recipe(**arguments)


@pytest.mark.parametrize("path", [None, 3, b"overlay.toml"])
def test_what_is_no_path_is_a_finding_of_the_overlay_and_of_the_plot(path):
    with pytest.raises(RecipeReferenceError, match="QR001 save_overlay takes a path"):
        ranking_of("mlp").save_overlay(path, 1)
    with pytest.raises(QRecipeError, match="QR421 plot takes a path"):
        ranking_of("mlp").plot(path)


def test_the_overlay_of_a_file_extends_it_from_wherever_it_is_saved(tmp_path):
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "recipes").mkdir()
    base = tmp_path / "recipes" / "base.toml"
    base.write_text(HEAD + FEW)
    net = NETS["mlp"]
    ranking = ranked(net.model(), net.batches(3), str(base))
    overlay = ranking.to_recipe(keep_float=1)
    assert overlay.origin("rules.global").file == "builtin:x86-static"
    for place in ("recipes/overlay.toml", "elsewhere.toml"):
        ranking.save_overlay(tmp_path / place, keep_float=1)
        text = (tmp_path / place).read_text()
        assert 'base.toml"' in text
        assert len(text.splitlines()) < 8
        saved = qrecipe.load_recipe(tmp_path / place)
        assert saved.fingerprint == overlay.fingerprint
    ranking.save_overlay(base, keep_float=1)
    assert "extends" not in base.read_text()
    assert qrecipe.load_recipe(base).fingerprint == overlay.fingerprint


def test_the_overlay_of_a_builtin_recipe_extends_it_and_a_text_is_inlined(tmp_path):
    net = NETS["mlp"]
    with pytest.warns(QRecipeWarning, match="QR201"):
        ranking = ranked(net.model(), net.batches(3), "builtin:x86-static")
    ranking.save_overlay(tmp_path / "overlay.toml", min_sqnr_db=1000)
    text = (tmp_path / "overlay.toml").read_text()
    assert 'extends = "builtin:x86-static"' in text
    assert text.count("when quantized alone") == 2
    ranking_of("mlp").save_overlay(tmp_path / "own.toml", keep_float=1)
    text = (tmp_path / "own.toml").read_text()
    assert "extends" not in text
    assert qrecipe.load_recipe(tmp_path / "own.toml").backend == "x86"


def test_a_rule_of_the_same_site_gives_way_to_the_overlay():
    net = NETS["mlp"]
    own = qrecipe.parse_recipe(f'{HEAD}{FEW}[rules.module_name]\nfc1 = "int8"\nfc2 = "int8"\n')
    overlay = ranked(net.model(), net.batches(3), own).to_recipe(keep_float=1)
    plan = qrecipe.plan(net.model(), overlay, net.batches(1)[0])
    assert sorted(site.verdict for site in plan.sites) == ["float", "quantized"]


def test_json_and_bars_show_the_order():
    sites = (
        RankedSite("a", "Conv2d", 10.0, None, 2),
        RankedSite("b", "Linear", 16.0, None, 2),
        RankedSite("c", "Linear", math.inf, None, 2),
    )
    ranking = Ranking(
        sites, {"d": "stays float"}, "exact", 2, False, None, STATIC, frozenset("abc")
    )
    document = json.loads(ranking.to_json())
    assert [site["name"] for site in document["sites"]] == ["a", "b", "c"]
    assert document["sites"][2] == {
        "name": "c",
        "op": "Linear",
        "sqnr_db": None,
        "exact": True,
        "is_estimate": False,
        "value": None,
        "batches": 2,
    }
    lengths = [line.count("█") for line in str(ranking).splitlines()[2:5]]
    assert lengths == [30, 15, 0]
    assert "exact" in str(ranking)
    assert "inf" not in str(ranking)
    reasons = [rule.reason for rule in float_rules(ranking.to_recipe(keep_float=3))]
    assert sorted(reasons) == [
        "10.0 dB when quantized alone",
        "16.0 dB when quantized alone",
        "no effect on the output when quantized alone",
    ]


def test_a_ranking_is_plotted(tmp_path):
    ranking_of("mlp").plot(tmp_path / "ranking.png")
    assert (tmp_path / "ranking.png").read_bytes().startswith(b"\x89PNG")
