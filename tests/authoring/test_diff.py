"""Two recipes side by side: by what they set, and by what they do to a model."""

from __future__ import annotations

import json

import pytest
from any_text import any_text
from command_line import NET, STATIC, TOP, model_folder, run
from hypothesis import given
from hypothesis import strategies as st
from plans import recipe

from qrecipe.authoring.diff import value_changes
from qrecipe.recipe.toml.writer import toml_key, toml_value


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "a.toml").write_text(TOP)
    (tmp_path / "b.toml").write_text(
        f'{TOP}backend = "fbgemm"\n'
        '[tensor.activation]\nobserver = { name = "histogram", bins = 512 }\n'
        '[rules.module_name]\n"fc" = { qconfig = "float", reason = "12 dB", expect = 1 }\n'
    )
    yield from model_folder(tmp_path, monkeypatch)


def rows(result):
    """The cells of every line."""
    assert result.exit_code == 1, result.output
    lines = [line.split("  ") for line in result.stdout.splitlines()]
    return [[cell.strip() for cell in line if cell.strip()] for line in lines]


def test_a_difference_shows_both_values_and_the_file_and_line_of_each(folder):
    found = rows(run("diff", "a.toml", "b.toml"))
    assert found[0] == ["value", "a.toml", "set at", "b.toml", "set at"]
    assert ["backend", '"x86"', f"{STATIC}:10:1", '"fbgemm"', "b.toml:3:1"] in found
    assert [
        "tensor.activation.observer",
        '"moving_average_minmax"',
        f"{STATIC}:18:1",
        '{ name = "histogram", bins = 512 }',
        "b.toml:5:1",
    ] in found
    rule = '{ qconfig = "float", expect = 1 }'
    assert ["rules.module_name.fc", "(not set)", rule, "b.toml:7:1"] in found
    assert found[-1] == ["3 values differ"]


def test_equal_recipes_end_with_status_zero_whatever_their_text(folder):
    (folder / "a.toml").write_text(
        f'# says the same\nextends = "{STATIC}"\ndescription = "mine"\nformat = 1\n'
        '[rules]\nglobal = { qconfig = "int8", reason = "as ever" }\n'
    )
    result = run("diff", "a.toml", STATIC)
    assert result.exit_code == 0
    assert result.stdout.startswith("no value differs (fingerprint ")


def test_with_a_model_each_site_is_shown_that_becomes_something_else(folder):
    found = rows(run("diff", "a.toml", "b.toml", *NET))
    assert [
        *("fc", "verdict", "quantized static", "float"),
        *("global = int8", 'module_name "fc" = float'),
    ] in found
    assert ["the plan", "backend", "x86", "fbgemm"] in found
    activation = "per_tensor_affine reduce_range"
    assert [
        *("conv", "activation", f"uint8 moving_average_minmax {activation}"),
        *(f"uint8 histogram(bins=512) {activation}", "global = int8", "global = int8"),
    ] in found
    assert found[-1] == ["3 values differ; 4 of 4 sites differ"]


def test_values_that_differ_without_effect_are_said_to_have_none(folder):
    (folder / "b.toml").write_text(TOP + '[rules.module_type]\n"torch.nn.LSTM" = "float"\n')
    result = run("diff", "a.toml", "b.toml", *NET)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == ("1 value differs; 0 of 4 sites differ")


def test_as_json_a_difference_has_stable_keys(folder):
    document = json.loads(run("diff", "a.toml", "b.toml", "--json", *NET).stdout)
    assert document["a"]["recipe"] == "a.toml"
    assert document["values"][-1] == {
        "key": "rules.module_name.fc",
        "a": None,
        "b": {"value": '{ qconfig = "float", expect = 1 }', "location": "b.toml:7:1"},
    }
    assert {
        "site": "fc",
        "part": "verdict",
        "a": "quantized static",
        "b": "float",
        "a_decided_by": "global = int8",
        "b_decided_by": 'module_name "fc" = float',
    } in document["sites"]
    assert json.loads(run("diff", "a.toml", "b.toml", "--json").stdout)["sites"] is None


def test_a_recipe_that_cannot_be_read_and_one_that_does_not_fit_are_findings(folder):
    assert "QR001" in run("diff", "a.toml", "gone.toml").stderr
    assert "QR001" in run("diff", ".", "a.toml").stderr
    (folder / "b.toml").write_text(TOP + '[rules.module_name]\n"fcc" = "float"\n')
    result = run("diff", "a.toml", "b.toml", *NET)
    assert result.exit_code == 1
    assert "b.toml:4:1: QR301" in result.stderr


NAMES = st.sampled_from(["fc", "conv.*", 'odd "name"', "ünï", "x" * 120, "a.b.c"])
RULES = st.dictionaries(
    NAMES,
    st.fixed_dictionaries(
        {"qconfig": st.sampled_from(["int8", "float"])},
        optional={"reason": any_text(max_size=5), "expect": st.integers(0, 3)},
    ),
    max_size=3,
)


@given(RULES, RULES)
def test_nothing_differs_if_and_only_if_the_fingerprints_are_equal(one, two):

    def of(rules):
        lines = (f"{toml_key(key)} = {toml_value(rule)}\n" for key, rule in rules.items())
        return recipe("[rules.module_name]\n" + "".join(lines))

    a, b = of(one), of(two)
    changes = list(value_changes(a, b))
    assert (not changes) == (a.fingerprint == b.fingerprint)
    mirrored = {(each.key, each.after, each.before) for each in value_changes(b, a)}
    assert mirrored == {(each.key, each.before, each.after) for each in changes}
    assert all(value is None or value.location for c in changes for value in (c.before, c.after))
