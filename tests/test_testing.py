"""`qrecipe.testing`: golden plans in a user's own suite."""

from __future__ import annotations

import pytest
from nets import Mlp
from plans import ROWS

from qrecipe.errors.findings import QRecipeError, UnmatchedRuleError
from qrecipe.testing import UPDATE_VARIABLE, assert_plan_matches

STATIC = "builtin:x86-static"
TOP = f'format = 1\nextends = "{STATIC}"\n'


@pytest.fixture
def golden(tmp_path, monkeypatch):
    monkeypatch.delenv(UPDATE_VARIABLE, raising=False)
    path = tmp_path / "golden" / "mlp.txt"
    assert_plan_matches(Mlp().eval(), STATIC, ROWS, path, update=True)
    return path


def message_of(*arguments, error=AssertionError):
    with pytest.raises(error) as caught:
        assert_plan_matches(Mlp().eval(), *arguments)
    return str(caught.value)


def test_a_golden_plan_has_the_sites_and_rules_and_holds(golden):
    text = golden.read_text()
    assert text.splitlines()[0].startswith(f"{STATIC} on x86 (ptq): ")
    assert "\nglobal = int8: applied, sites: 2\n" in text
    activation = "uint8 moving_average_minmax per_tensor_affine reduce_range"
    first = text.split("\n\n")[1]
    assert first.splitlines() == [
        "fc1: Linear+relu",
        "    quantized static, decided by global = int8",
        "    weight int8 per_channel_minmax per_channel_symmetric",
        f"    activation {activation}",
        "    input float, quantized here",
    ]
    plan = assert_plan_matches(Mlp().eval(), STATIC, ROWS, golden)
    assert [site.name for site in plan.sites] == ["fc1", "fc2"]


def test_another_plan_fails_with_the_lines_that_differ(golden, tmp_path):
    (tmp_path / "top.toml").write_text(TOP + '[rules.module_name]\nfc1 = "float"\n')
    message = message_of(tmp_path / "top.toml", ROWS, golden)
    assert message.startswith(f"the plan differs from {golden}\n--- golden\n+++ the plan now\n")
    lines = message.splitlines()
    assert "-    quantized static, decided by global = int8" in lines
    assert '+    float, decided by module_name "fc1" = float' in lines
    assert " fc1: Linear+relu" in lines
    assert f"{UPDATE_VARIABLE}=1" in message


def test_another_observer_alone_is_another_plan_and_one_line_for_each_site(golden, tmp_path):
    text = TOP + '[tensor.activation]\nobserver = { name = "histogram", bins = 64 }\n'
    (tmp_path / "top.toml").write_text(text)
    lines = message_of(tmp_path / "top.toml", ROWS, golden).splitlines()
    added = [line for line in lines if line.startswith("+    ")]
    spec = "uint8 histogram(bins=64) per_tensor_affine reduce_range"
    assert added == 2 * [f"+    activation {spec}"]


def test_a_missing_golden_file_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.delenv(UPDATE_VARIABLE, raising=False)
    path = tmp_path / "golden.txt"
    message = message_of(STATIC, ROWS, path)
    assert message.startswith(f"cannot read the golden plan {path}: no such file\n")
    assert f"{UPDATE_VARIABLE}=1" in message
    assert not path.exists()
    monkeypatch.setenv(UPDATE_VARIABLE, "1")
    assert_plan_matches(Mlp().eval(), STATIC, ROWS, path)
    monkeypatch.delenv(UPDATE_VARIABLE)
    assert_plan_matches(Mlp().eval(), STATIC, ROWS, path)


def test_the_variable_gives_way_to_the_argument(golden, monkeypatch):
    monkeypatch.setenv(UPDATE_VARIABLE, "1")
    golden.write_text("another")
    with pytest.raises(AssertionError):
        assert_plan_matches(Mlp().eval(), STATIC, ROWS, golden, update=False)
    assert golden.read_text() == "another"


def test_neither_comments_nor_the_folder_show(golden, tmp_path, monkeypatch):
    recipe = tmp_path / "top.toml"
    recipe.write_text(TOP)
    assert_plan_matches(Mlp().eval(), recipe, ROWS, golden, update=True)
    assert golden.read_text().startswith("../top.toml on x86")
    assert str(tmp_path) not in golden.read_text()
    recipe.write_text(f"# a comment\n\n{TOP}")
    monkeypatch.chdir(golden.parent)
    assert_plan_matches(Mlp().eval(), "../top.toml", ROWS, "mlp.txt")


@pytest.mark.parametrize("content", [b"", bytes(range(256)), b"\xff\xfe"])
def test_a_golden_file_of_anything_else_is_a_difference(golden, content):
    golden.write_bytes(content)
    assert "the plan differs from" in message_of(STATIC, ROWS, golden)


def test_a_golden_file_that_is_a_folder_is_said_to_be_one(tmp_path):
    assert "is a directory" in message_of(STATIC, ROWS, tmp_path)
    with pytest.raises(QRecipeError, match="not a regular file"):
        assert_plan_matches(Mlp().eval(), STATIC, ROWS, tmp_path, update=True)


def test_a_recipe_that_does_not_fit_raises_as_plan_does(golden, tmp_path):
    (tmp_path / "top.toml").write_text(TOP + '[rules.module_name]\nfc9 = "float"\n')
    assert "QR301" in message_of(tmp_path / "top.toml", ROWS, golden, error=UnmatchedRuleError)


def test_in_a_suite_the_failure_points_at_the_test(tmp_path, monkeypatch, capsys):
    file = tmp_path / "test_net_of_a_user.py"
    file.write_text(
        "import torch\nfrom pathlib import Path\nfrom qrecipe.testing import assert_plan_matches\n"
        "def test_plan():\n"
        "    net = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()\n"
        f"    assert_plan_matches(net, {STATIC!r}, torch.ones(1, 4), Path(__file__).parent / 'g')\n"
    )

    def suite():
        return pytest.main(["-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(file)])

    monkeypatch.delenv(UPDATE_VARIABLE, raising=False)
    assert suite() == pytest.ExitCode.TESTS_FAILED
    printed = capsys.readouterr().out
    assert "test_net_of_a_user.py:6: AssertionError" in printed
    assert "qrecipe/testing.py" not in printed
    monkeypatch.setenv(UPDATE_VARIABLE, "1")
    assert suite() == pytest.ExitCode.OK
    monkeypatch.delenv(UPDATE_VARIABLE)
    assert suite() == pytest.ExitCode.OK
