"""Arguments of plugins are checked when a recipe is planned, at their place."""

from __future__ import annotations

import pytest
import torch
from distributions import install
from plugin_recipes import ARGUMENTS, RECIPE, model, refused, under_caret
from typer.testing import CliRunner

import qrecipe
from qrecipe.cli.app import app
from qrecipe.errors.findings import (
    PluginError,
    QRecipeError,
    SchemaError,
    UnknownNameError,
    UnsupportedError,
)


@pytest.mark.parametrize(
    ("observer", "code", "marked", "says"),
    [
        ('{ name = "opted", shar = 1 }', "QR105", "shar", 'did you mean "share"?'),
        ('{ name = "opted", share = 2 }', "QR106", "2", "less than or equal to 1"),
        ('{ name = "opted", share = "x" }', "QR106", '"x"', "cannot be"),
        ('{ name = "opted", odd = 13 }', "QR106", '"opted"', "unlucky"),
        ('{ name = "plain", share = true }', "QR106", "true", "a finite number"),
        ('{ name = "plain", names = 1 }', "QR105", "names", 'it takes "share"'),
        ('{ name = "plain", share = -1 }', "QR311", '{ name = "plain", share = -1 }', "negative"),
        ('{ name = "plain", share = 0 }', "QR311", '{ name = "plain", share = 0 }', "no share"),
    ],
)
def test_arguments_are_checked_when_planning_at_their_place(site, observer, code, marked, says):
    install(site, "acme", {"observer.opted": "acme", "observer.plain": "acme"}, acme=ARGUMENTS)
    kind = {"QR105": UnknownNameError, "QR106": SchemaError, "QR311": UnsupportedError}[code]
    finding = refused(observer, kind)
    assert (finding.code, under_caret(finding)) == (code, marked)
    assert says in str(finding)


def test_what_no_observer_can_be_made_with_is_a_finding_before_any_model_runs(site):
    module = ARGUMENTS.replace("names: dict[str, int] = {}", "names: dict[str, int] = {'a': 1}")
    install(site, "acme", {"observer.opted": "acme"}, acme=module)
    assert refused('"opted"', UnsupportedError).code == "QR311"


def test_findings_about_several_plugins_come_at_once(site):
    install(
        site,
        "acme",
        {"observer.opted": "acme", "observer.gone": "acme_gone", "fake_quant.gone": "acme_gone"},
        acme=ARGUMENTS,
    )
    text = RECIPE.format(observer='{ name = "opted", shar = 1 }')
    text += 'fake_quant = "gone"\n[tensor.weight]\nobserver = "gone"\n'
    with pytest.raises(QRecipeError) as caught:
        qrecipe.plan(model(), qrecipe.parse_recipe(text), torch.rand(2, 4))
    found = sorted((f.location.line, f.code) for f in caught.value.findings)
    assert found == [(4, "QR105"), (5, "QR152"), (7, "QR152")]


def test_a_finding_stands_in_the_base_recipe_that_names_the_plugin(site, tmp_path):
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine="raise OSError")
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "base.toml").write_text(RECIPE.format(observer='"mine"'))
    (tmp_path / "top.toml").write_text('extends = "./base.toml"\n')
    with pytest.raises(PluginError) as caught:
        qrecipe.plan(model(), tmp_path / "top.toml", torch.rand(2, 4))
    assert str(caught.value.findings[0].location) == f"{tmp_path / 'base.toml'}:4:12"


def test_odd_names_of_tensors_do_not_hide_where_a_plugin_is_named(site):
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine="raise OSError")
    odd = "a.\\u001b\\u2028" + "x" * 200
    text = RECIPE.format(observer='"minmax"') + (
        f'[tensor."{odd}"]\ndtype = "uint8"\nqscheme = "per_tensor_affine"\nobserver = "mine"\n'
    )
    with pytest.raises(PluginError) as caught:
        qrecipe.plan(model(), qrecipe.parse_recipe(text), torch.rand(2, 4))
    assert caught.value.findings[0].location.line == 8


AT_THE_MISTAKE = """\
own.toml:4:30: QR105 observer "opted" has no argument "shar"
    4 | observer = { name = "opted", shar = 1.0 }
      |                              ^^^^ did you mean "share"?
"""


def test_the_command_line_checks_what_it_can_and_plans_with_the_rest(site, tmp_path, monkeypatch):
    install(site, "acme", {"observer.opted": "acme"}, acme=ARGUMENTS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.toml").write_text(RECIPE.format(observer='{ name = "opted", shar = 1.0 }'))
    (tmp_path / "net.py").write_text("import torch\ndef net():\n    return torch.nn.Linear(4, 4)\n")
    assert CliRunner().invoke(app, ["check", "own.toml"]).exit_code == 0
    command = ["plan", "own.toml", "--model", "net.py:net", "--input", "1x4"]
    result = CliRunner().invoke(app, command)
    assert (result.exit_code, result.stderr) == (1, AT_THE_MISTAKE)
