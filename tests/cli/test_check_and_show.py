"""``qrecipe check`` and ``qrecipe show``, of one recipe or several, and their plugins."""

from __future__ import annotations

import json

import pytest
from command_line import RECIPE, STATIC, run

from qrecipe.registry import table as registered

OBSERVERS = """
import qrecipe
from torch.ao.quantization.observer import MinMaxObserver

@qrecipe.register_observer("house_minmax")
class HouseMinMax(MinMaxObserver):
    pass
"""


def test_check_reports_all_files_and_ends_with_a_summary(folder):
    result = run("check", "good.toml", "bad.toml", "gone.toml", STATIC)
    assert result.exit_code == 1
    assert "QR104" in result.stdout
    assert "QR001" in result.stdout
    assert result.stdout.splitlines()[-1] == "4 recipes checked: 2 errors"
    assert result.stderr == ""


def test_check_shows_what_is_wrong_with_a_shared_base_once(folder):
    for name in ("a.toml", "b.toml"):
        (folder / name).write_text('format = 1\nextends = "./base.toml"\n')
    (folder / "base.toml").write_text("format = 1\nbackend = 3\n[rules]\nglobal = 'float'\n")
    result = run("check", "a.toml", "b.toml")
    assert result.stdout.count("QR102") == 1
    assert len(json.loads(run("check", "--json", "a.toml", "b.toml").stdout)["findings"]) == 2


def test_sound_recipes_end_with_status_zero(folder):
    result = run("check", "good.toml", STATIC)
    assert (result.exit_code, result.stdout) == (0, "2 recipes checked: no errors\n")
    assert json.loads(run("check", "--json", "good.toml").stdout)["findings"] == []


def test_check_as_json_has_stable_keys(folder):
    result = run("check", "--json", "bad.toml", "good.toml")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert set(document) == {"recipes", "findings"}
    assert [each["recipe"] for each in document["recipes"]] == ["bad.toml", "good.toml"]
    (finding,) = document["findings"]
    assert set(finding) == {
        *("recipe", "code", "severity", "message", "location", "hint", "related", "notes")
    }
    assert finding["recipe"] == "bad.toml"
    assert (finding["location"]["line"], finding["location"]["column"]) == (9, 12)


HOSTILE = {
    "empty": b"",
    "nul": b"format = 1\0",
    "utf16": "format = 1".encode("utf-16"),
    "deep": b"x = " + b"[" * 50_000,
    "big": b"#" * 2**21,
    "number": b"format = " + b"9" * 10_000,
    "escape": b'format = 1\nname = "\x1b[2Jgone"\n',
    "escaped": b'format = 1\nbackend = "\\u001b[2J\\u009b31m"\n[rules]\nglobal = "\\u202e"\n',
    "binary": bytes(range(256)),
    "path": b'format = 1\nextends = "/etc/passwd"\n',
    "import": b'format = 1\nbackend = "x86"\n[tensor.a]\nobserver = "os:system"\ndtype = "int8"\n',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_recipe_ends_in_findings_that_cannot_steer_the_terminal(folder, name):
    (folder / "hostile.toml").write_bytes(HOSTILE[name])
    result = run("check", "hostile.toml", "good.toml")
    assert result.exit_code == 1
    assert "hostile.toml:" in result.stdout
    assert "2 recipes checked" in result.stdout
    assert not set(result.output) & {"\x1b", "\x9b", "\x00", "\u202e"}


def test_plugin_makes_its_observers_known(folder):
    (folder / "plugin.py").write_text(OBSERVERS)
    (folder / "house.toml").write_text(RECIPE.format(observer="house_minmax"))
    try:
        assert run("check", "house.toml").exit_code == 1
        assert run("check", "house.toml", "--plugin", "plugin.py").exit_code == 0
        listed = json.loads(run("list", "--json", "--plugin", "plugin").stdout)
        origins = {line["name"]: line["origin"] for line in listed["observers"]}
        assert origins["house_minmax"] == "plugin"
    finally:
        registered.remove("observer", "house_minmax")


@pytest.mark.parametrize("command", ["quantize", "compare", "sensitivity", "fastest", "export"])
def test_plugins_are_known_to_commands_that_write_files(folder, command):
    (folder / "plugin.py").write_text(OBSERVERS)
    unmatched = 'module_name.convv = "float"\n'  # found by the plan, after the names of observers
    (folder / "house.toml").write_text(RECIPE.format(observer="house_minmax") + unmatched)
    given = ("--model", "model.py:factory", "--data", "model.py:batches", "--plugin", "plugin.py")
    more = ("--to", "onnx", "--out", "house.onnx") if command == "export" else ()
    result = run(command, "house.toml", *given, *more)
    assert "QR104" not in result.stderr
    assert "QR301" in result.stderr


def test_plugin_that_fails_is_no_traceback(folder):
    (folder / "plugin.py").write_text("import nowhere_to_be_found\n")
    result = run("check", "good.toml", "--plugin", "plugin")
    assert result.exit_code == 1
    assert "plugin.py:1:1: QR152 importing plugin failed: ModuleNotFoundError" in result.stderr
    assert run("check", "good.toml", "--plugin", "plugiin").exit_code == 2


def test_show_prints_a_recipe_with_the_origin_of_each_value(folder):
    (folder / "top.toml").write_text(
        f'format = 1\nextends = "{STATIC}"\n[rules.module_name]\n"conv" = "float"\n'
        '[tensor.activation]\nobserver = { name = "histogram", bins = 256 }\n'
        'dtype = "uint8"\nqscheme = "per_tensor_affine"\n'
    )
    result = run("show", "top.toml")
    lines = [line.rsplit("  # ", 1) for line in result.stdout.splitlines() if "  # " in line]
    origins = {code.split(" = ")[0].strip(): origin for code, origin in lines}
    assert origins['"conv"'] == "top.toml:4"
    assert origins["observer"] == "top.toml:6"
    assert origins["global"].startswith(f"{STATIC}:")
    (folder / "shown.toml").write_text(result.stdout)
    top, shown = (json.loads(run("show", "--json", n).stdout) for n in ("top.toml", "shown.toml"))
    assert top["values"] == shown["values"]
    assert top["fingerprint"] == shown["fingerprint"]
    assert top["origins"]["rules.module_name.conv"]["line"] == 4
    assert top["origins"]["tensor.activation.observer.bins"]["file"] == "top.toml"


def test_show_puts_the_origin_of_a_text_of_several_lines_behind_its_end(folder):
    text = 'description = """\nFirst line,\nsecond. """\n'
    (folder / "top.toml").write_text(f'format = 1\nextends = "{STATIC}"\n{text}')
    shown = run("show", "top.toml").stdout
    (folder / "shown.toml").write_text(shown)
    values = json.loads(run("show", "--json", "shown.toml").stdout)["values"]
    assert values["description"] == "First line,\nsecond. "
    assert '"""' in next(line for line in shown.splitlines() if line.endswith("# top.toml:3"))


def test_show_reports_findings_on_stderr_and_as_json(folder):
    result = run("show", "bad.toml", "--json")
    assert result.exit_code == 1
    assert "QR104" in result.stderr
    assert json.loads(result.stdout)["findings"][0]["code"] == "QR104"
