"""Warnings about recipes: what nothing uses, what matches everything, what has no effect."""

from __future__ import annotations

import json

import pytest
from command_line import NET, STATIC, TOP, model_folder, run
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT
from plans import plan_of, recipe
from recipe_texts import FULL, HEAD, INT8, findings_of, marked

from qrecipe.errors.findings import CODES, QRecipeError, SchemaError
from qrecipe.recipe.checks import _PROBES
from qrecipe.recipe.patterns import NamePatterns
from qrecipe.recipe.recipe import load_recipe, parse_recipe
from qrecipe.recipe.references import builtin_names

WIDE = '[tensor.wide]\nobserver = "minmax"\ndtype = "uint8"\nqscheme = "per_tensor_affine"\n'
USED = FULL.replace('rules.global = "float"', 'rules.global = "int8"')


@pytest.fixture
def folder(tmp_path, monkeypatch):
    yield from model_folder(tmp_path, monkeypatch)


def warnings_of(text, path=None):
    found = parse_recipe(text, path).warnings
    assert {finding.severity for finding in found} <= {"warning"}
    return [(finding.code, marked(finding)) for finding in found]


def codes_of(plan):
    return [finding.code for finding in plan.warnings if finding.code == "QR217"]


# qconfigs and tensors


def test_a_qconfig_and_the_tensors_that_no_rule_leads_to_are_marked():
    assert warnings_of(FULL) == [("QR215", "weight"), ("QR215", "activation"), ("QR214", "int8")]
    hints = {finding.hint for finding in parse_recipe(FULL).warnings if finding.code == "QR215"}
    assert hints == {'only the qconfig "int8" uses it, which no rule uses'}
    assert warnings_of(USED) == []


def test_a_tensor_that_nothing_names_is_to_be_removed_or_named():
    assert warnings_of(USED + WIDE) == [("QR215", "wide")]
    (finding,) = parse_recipe(USED + WIDE).warnings
    assert finding.hint == "remove it, or name it in a qconfig or a rule"


def test_a_tensor_that_a_rule_names_itself_is_used():
    rule = '[rules.module_name]\nfc = { weight = "weight", activation = "wide" }\n'
    assert warnings_of(USED + WIDE + rule) == []


def test_what_a_base_sets_and_nothing_uses_is_no_business_of_the_extending_recipe(folder):
    (folder / "base.toml").write_text(FULL + WIDE)
    (folder / "top.toml").write_text('extends = "./base.toml"\n')
    assert load_recipe("top.toml").warnings == ()
    assert len(load_recipe("base.toml").warnings) == 4
    (folder / "top.toml").write_text(
        'extends = "./base.toml"\n[tensor.wide]\nreduce_range = true\n'
    )
    (finding,) = load_recipe("top.toml").warnings
    assert (finding.code, str(finding.location)) == ("QR215", "top.toml:2:9")


def test_a_rule_of_the_extending_recipe_uses_what_a_base_defines_and_the_other_way_round(folder):
    (folder / "base.toml").write_text(FULL)
    (folder / "top.toml").write_text('extends = "./base.toml"\n[rules]\nglobal = "int8"\n')
    assert load_recipe("top.toml").warnings == ()
    (folder / "base.toml").write_text(HEAD.replace('"float"', '"int8"') + INT8)
    own = FULL.partition(INT8)[0].partition('rules.global = "float"\n')[2]
    (folder / "top.toml").write_text('extends = "./base.toml"\n' + own)
    assert load_recipe("top.toml").warnings == ()


# patterns


@pytest.mark.parametrize("key", ["*", "**.*", "{*}", "{a,*}", "*.**", "?*", "***"])
def test_a_pattern_that_matches_every_module_is_marked(key):
    text = f'{USED}[rules.module_name]\n"{key}" = "float"\n'
    if key == "***":
        assert findings_of(text)[0].code == "QR110"
    else:
        assert warnings_of(text) == [("QR216", f'"{key}"')]


@pytest.mark.parametrize(
    "key", ["*.conv", "layer*", "[a-z]*", "**.fc", "??*", "*:add", "*.*", "*[0-9]", "fc", "{a,b}*"]
)
def test_a_pattern_that_leaves_something_out_is_not(key):
    assert warnings_of(f'{USED}[rules.module_name]\n"{key}" = "float"\n') == []


@given(st.text("ab*?.[]{},0", min_size=1, max_size=6), st.text("abc019_", min_size=1, max_size=5))
def test_what_matches_the_probes_matches_any_module_of_the_root(key, name):
    try:
        pattern = NamePatterns([key])
    except SchemaError:
        return
    if all(map(pattern.matching, _PROBES)):
        assert pattern.matching(name)


# shadowed rules


def test_a_rule_whose_sites_others_decide_is_a_warning_of_the_plan_that_names_them():
    rules = '[rules.module_name]\nconv1 = "float"\n[rules.module_type]\n'
    text = f'{rules}"torch.nn.Linear" = "float"\n[rules.function]\n"torch.flatten" = "float"\n'
    assert codes_of(plan_of("residual", recipe(text))) == []
    shadowed = text + '"torch.add" = "float"\n[rules.module_name."layer1.*"]\nqconfig = "float"\n'
    plan = plan_of("residual", recipe(shadowed))
    (finding,) = [finding for finding in plan.warnings if finding.code == "QR217"]
    assert finding.message == (
        'function "torch.add" has no effect: everything it covers is decided by '
        'module_name "layer1.*"'
    )
    assert (
        finding.location.line
        == plan.rules[[v.rule.key for v in plan.rules].index("torch.add")].location.line
    )
    assert "layer1.0:add" in finding.hint
    assert "QR217" in str(plan)


def test_rules_that_cover_nothing_global_rules_and_inherited_ones_are_no_warning(folder):
    unused = '[rules.module_type]\n"torch.nn.LSTM" = "float"\n'
    assert codes_of(plan_of("residual", recipe(unused))) == []
    everything = '[rules]\nglobal = "int8"\n[rules.module_type]\n"nets.Residual" = "float"\n'
    assert codes_of(plan_of("residual", recipe(everything))) == []
    (folder / "base.toml").write_text(TOP + '[rules.module_type]\n"torch.nn.Linear" = "float"\n')
    (folder / "top.toml").write_text('extends = "./base.toml"\n[rules.module_name]\nfc = "int8"\n')
    assert codes_of(plan_of("residual", "top.toml")) == []


# silenced, reported


@pytest.mark.parametrize("code", ["QR214", "QR215", "QR216", "QR217"])
def test_each_code_is_a_warning_that_ignore_silences(code):
    assert CODES[code].error is None
    rules = '[rules.module_type]\n"torch.nn.BatchNorm2d" = "float"\n'
    text = f'{rules}[rules.module_name]\n"*" = "int8"\n[qconfig.other]\nactivation = "wide"\n{WIDE}'

    def found(lint):
        loaded = recipe(text + lint)
        plan = plan_of("residual", loaded)
        every = (*loaded.warnings, *plan.warnings)
        return {finding.code for finding in every} & {"QR214", "QR215", "QR216", "QR217"}

    everything = found("")
    assert everything == {"QR214", "QR215", "QR216", "QR217"}
    assert found(f'[lint]\nignore = ["{code}"]\n') == everything - {code}


def test_check_reports_warnings_with_a_caret_and_passes_unless_it_is_strict(folder):
    (folder / "a.toml").write_text(TOP + WIDE)
    result = run("check", "a.toml", STATIC)
    assert result.exit_code == 0
    assert result.stdout == (
        'a.toml:3:9: QR215 no rule uses the tensor "wide"\n'
        "    3 | [tensor.wide]\n"
        "      |         ^^^^ remove it, or name it in a qconfig or a rule\n"
        "\n"
        "2 recipes checked: no errors, 1 warning\n"
    )
    assert run("check", "--strict", "a.toml", STATIC).exit_code == 1
    assert run("check", "--strict", STATIC).exit_code == 0
    (finding,) = json.loads(run("check", "--json", "a.toml").stdout)["findings"]
    assert (finding["code"], finding["severity"]) == ("QR215", "warning")
    assert finding["location"]["line"] == 3


def test_check_leaves_lock_files_out_so_that_it_takes_all_files_of_a_folder(folder):
    (folder / "cnn.toml").write_text(TOP)
    assert run("lock", "cnn.toml", *NET).exit_code == 0
    result = run("check", "cnn.lock.toml", "cnn.toml")
    assert result.stdout == "1 recipe checked: no errors\n"


@pytest.mark.parametrize("name", builtin_names())
def test_shipped_recipes_warn_those_alone_who_write_them_and_of_nothing_but_offers(name):
    assert load_recipe(f"builtin:{name}").warnings == ()
    own = load_recipe(ROOT / "recipes" / f"{name}.toml").warnings
    assert {finding.code for finding in own} <= {"QR214", "QR215"}


def test_no_shipped_recipe_keeps_a_warning_back_from_those_who_extend_it():
    assert {load_recipe(f"builtin:{name}").lint.ignore for name in builtin_names()} == {()}


def test_a_range_wider_than_the_dtype_is_an_error_and_cannot_be_ignored():
    text = USED.replace('dtype = "uint8"\n', 'dtype = "uint8"\nquant_min = 0\nquant_max = 300\n')
    (finding,) = findings_of(text)
    assert (finding.code, marked(finding)) == ("QR109", "300")
    assert findings_of(USED + '[lint]\nignore = ["QR109"]\n')[0].code == "QR102"


def test_a_rule_that_is_an_error_already_is_not_warned_about_too():
    with pytest.raises(QRecipeError) as caught:
        plan_of("residual", recipe('[rules.module_name]\n"bn1" = "float"'))
    assert [finding.code for finding in caught.value.findings] == ["QR304"]
    assert codes_of(caught.value.plan) == []
