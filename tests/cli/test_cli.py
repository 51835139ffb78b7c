"""The command line: what it prints, where, and how it ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import typer
from command_line import RECIPE, STATIC, run
from places import ROOT

from qrecipe.cli.app import app
from qrecipe.cli.output import out
from qrecipe.registry import table as registered

DYNAMIC = "builtin:x86-dynamic"

OBSERVERS = """
import qrecipe
from torch.ao.quantization.observer import MinMaxObserver

@qrecipe.register_observer("house_minmax")
class HouseMinMax(MinMaxObserver):
    pass
"""


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


# the program


def test_misspelt_observer_is_shown_with_its_line_a_caret_and_the_right_name(folder):
    done = python("-m", "qrecipe", "check", str(folder / "bad.toml"))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == f'{folder}/bad.toml:9:12: QR104 unknown observer "minmaxx"'
    assert lines[1] == '    9 | observer = "minmaxx"'
    assert lines[2] == '      |            ^^^^^^^^^ did you mean "minmax"?'
    assert lines[-1] == "1 recipe checked: 1 error"


TORCH_FREE = (["check", STATIC], ["show", STATIC], ["diff", STATIC, STATIC], ["schema"])


def test_commands_without_a_model_import_no_torch():
    code = (
        "import sys\n"
        "from qrecipe.__main__ import main\n"
        f"for arguments in {TORCH_FREE}:\n"
        "    sys.argv = ['qrecipe', *arguments]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as error:\n"
        "        assert error.code == 0, error.code\n"
        "print(sorted(name for name in sys.modules if name.partition('.')[0] == 'torch'))\n"
    )
    done = python("-c", code)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_misspelt_choice_is_told_the_nearest_one():
    told = set()
    for command in typer.main.get_command(app).commands:
        for option, words in re.findall(
            r"(--[\w-]+) +[<\[](\w+(?:\|\w+)+)[>\]]", run(command, "-h").output
        ):
            named = words.split("|")
            result = run(command, option, f"{named[-1]}x")
            assert result.exit_code == 2
            listed = ", ".join(map(repr, named))
            near = f"'{named[-1]}x' is not one of {listed}. Did you mean '{named[-1]}'?"
            assert f"Error: Invalid value for '{option}': {near}" in result.output
            told.add(option)
    assert told == {"--executor", "--target-cpu", "--method", "--to", "--runtime"}
    assert "is not one of" in (far := run("plan", STATIC, "--executor", "9").output)
    assert "Did you mean" not in far


def test_missing_extra_is_named_without_a_traceback():
    code = "import sys; sys.modules['typer'] = None; import qrecipe.__main__ as m; m.main()"
    done = python("-c", code)
    assert done.returncode == 2
    assert "needs the extra cli: pip install 'qrecipe[cli]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_model_is_quantized_into_a_pipe_without_colours_and_progress(folder, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    model = ("--model", "model.py:factory", "--data", "model.py:batches")
    evaluated = ("--evaluate", "model.py:accuracy", "--threads", "1")
    done = run("quantize", STATIC, *model, *evaluated)
    assert done.exit_code == 0, done.stderr
    assert "3 sites, 2 quantized, 1 passthrough, 0 float" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert "calibrating" not in done.stdout + done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    assert rows["accuracy"] == ["accuracy", "4", "4", "+0"]
    assert float(rows["tensors"][5]) > 2
    assert "1 thread" in done.stdout


def test_separators_of_lines_are_not_printed(capsys):
    out("one\u2028two\u2029three")
    assert capsys.readouterr().out == "one\ufffdtwo\ufffdthree\n"


def test_text_that_a_pipe_cannot_encode_is_escaped():
    command = ("-m", "qrecipe", "diff", STATIC, "builtin:arm-static")  # without torch
    done = python(*command, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 1, done.stderr
    assert "\\u2500" in done.stdout


# check


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


# show


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


# plan and explain


def test_plan_lists_the_sites_and_keeps_what_the_model_prints_apart(folder):
    result = run("plan", STATIC, "--model", "model.py:factory")
    assert result.exit_code == 0, result.stderr
    assert "loading model" in result.stderr
    assert "loading model" not in result.stdout
    assert "Conv2d" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    plan = json.loads(run("plan", STATIC, "--model", "model:factory", "--json").stdout)
    assert [site["name"] for site in plan["sites"]] == ["conv", ":mean", "fc"]


def test_plan_takes_random_inputs_of_a_shape(folder):
    assert run("plan", STATIC, "--model", "model:bare", "--input", "2x3x8x8").exit_code == 0
    without = run("plan", STATIC, "--model", "model:bare")
    assert without.exit_code == 2
    assert "--input 1x3x224x224" in without.stderr


@pytest.mark.parametrize("shape", ["", "3,8", "0x3", "1x-3", "9999999999x9999999999", "x", "٣x٣"])
def test_shape_that_is_none_is_a_usage_error(folder, shape):
    result = run("plan", STATIC, "--model", "model:bare", "--input", shape)
    assert result.exit_code == 2
    assert "is not a shape" in result.stderr


def test_plan_with_errors_is_shown_and_the_findings_are_on_stderr(folder):
    rules = '[rules.module_name]\n"convv" = "float"\n"fcc" = "float"\n'
    (folder / "top.toml").write_text(f'format = 1\nextends = "{STATIC}"\n{rules}')
    result = run("plan", "top.toml", "--model", "model.py:factory")
    assert result.exit_code == 1
    assert "unmatched" in result.stdout
    assert result.stderr.count("QR301") == 2
    document = run("plan", "top.toml", "--model", "model.py:factory", "--json").stdout
    assert [finding["code"] for finding in json.loads(document)["findings"]] == ["QR301"] * 2


_DATA = ("--data", "model.py:batches")


@pytest.mark.parametrize(
    "command",
    [
        ("plan",),
        ("plan", "--strict"),
        ("lock",),
        ("quantize", *_DATA),
        ("export", *_DATA, "--to", "pt2", "--out", "model.pt2"),
        ("sensitivity", *_DATA),
    ],
)
def test_each_finding_about_a_plan_with_errors_is_shown_once(folder, command):
    (folder / "faulty.toml").write_text(
        f'format = 1\nextends = "{STATIC}"\nrules.module_name.convolution = "float"\n'
    )
    name, *others = command
    done = run(name, "faulty.toml", *others, "--model", "model.py:factory")
    assert re.findall(r"\bQR\d{3}\b", done.output) == ["QR208", "QR301"]


@pytest.mark.parametrize(
    "command",
    [
        ("plan",),
        ("quantize", *_DATA),
        ("export", *_DATA, "--to", "pt2", "--out", "model.pt2"),
    ],
)
def test_warnings_that_are_errors_are_shown_once(folder, command):
    name, *others = command
    done = run(name, STATIC, *others, "--model", "model.py:factory", "--strict")
    assert re.findall(r".*\bQR\d{3}\b", done.output) == ["error: QR208"]
    assert "3 sites, 2 quantized" in done.stdout


def test_explain_tells_the_rule_of_a_member(folder):
    result = run("explain", STATIC, "norm", "--model", "model.py:factory")
    assert result.exit_code == 0, result.stderr
    assert "norm is a member of this fused group" in result.stdout
    assert "global = int8" in result.stdout


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_explain_explains_in_spite_of_errors_and_shows_them(folder, as_json):
    text = f'format = 1\nextends = "{STATIC}"\n[rules.module_name]\nnorm = "float"\n'
    (folder / "wrong.toml").write_text(text)
    result = run("explain", "wrong.toml", "norm", "--model", "model.py:factory", *as_json)
    assert result.exit_code == 1
    assert re.findall(r"\bQR\d{3}\b", result.stderr) == ["QR304"]
    assert 'write the rule for "conv"' in result.stderr
    if as_json:
        document = json.loads(result.stdout)
        assert [site["name"] for site in document["sites"]] == ["conv"]
        assert [finding["code"] for finding in document["findings"]] == ["QR304"]
    else:
        assert result.stdout.startswith("conv  ")
        assert "norm is a member of this fused group" in result.stdout


def test_explain_of_an_unknown_name_suggests_without_the_whole_plan(folder):
    result = run("explain", STATIC, "convv", "--model", "model.py:factory")
    assert result.exit_code == 1
    assert "QR310" in result.stderr
    assert 'did you mean "conv"?' in result.stderr
    assert result.stdout == ""


# the user's code


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model.py", "FILE.py:NAME|path/to/file.py:function"),
        ("model.py:", "path/to/file.py:function"),
        ("modell.py:factory", 'did you mean "model.py"?'),
        ("model.py:facttory", 'did you mean "factory"?'),
        ("modell:factory", 'there is no module "modell"'),
        ("model.py:instance", "name a function that returns it"),
    ],
)
def test_wrong_name_of_a_model_is_a_usage_error(folder, name, text):
    result = run("plan", STATIC, "--model", name)
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert any(part in said for part in text.split("|")), said


def test_error_of_the_factory_shows_the_users_line(folder):
    result = run("plan", STATIC, "--model", "model.py:broken")
    assert result.exit_code == 1
    assert "model.py:40:5: QR601 broken() failed: KeyError: 'missing'" in result.stderr
    assert '   40 |     return weights["missing"]' in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def factory(:\n", "faulty.py:1:1: QR601 loading faulty.py failed: SyntaxError"),
        ("import sys\nsys.exit(3)\n", "faulty.py:2:1: QR601 loading faulty.py failed: SystemExit"),
        ("\nfrom . import x\n", "faulty.py:2:1: QR601 loading faulty.py failed: ImportError"),
        (
            "import torch\n\ndef factory():\n    return torch.ones(2) @ torch.ones(3)\n",
            "faulty.py:4:5: QR601 factory() failed: RuntimeError",
        ),
    ],
)
def test_faulty_file_of_the_user_is_no_traceback(folder, source, message):
    (folder / "faulty.py").write_text(source)
    result = run("plan", STATIC, "--model", "faulty.py:factory")
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_file_of_a_package_is_told_how_it_is_named(folder):
    (folder / "faulty.py").write_text("from . import x\n")
    result = run("plan", STATIC, "--model", "faulty.py:factory")
    assert "| ^^^^^^^^^^^^^^^ name a file of a package as its module" in result.stderr


def test_factory_that_gives_no_model_says_so(folder):
    result = run("plan", STATIC, "--model", "model.py:number")
    assert result.exit_code == 1
    assert "QR601 model.py:number returns a int, not a model" in result.stderr


def test_search_path_is_restored_and_the_file_runs_once(folder):
    before = list(sys.path)
    name = "model.py:factory"
    result = run("quantize", STATIC, "--model", name, "--data", f"./{name[:8]}:batches")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("loading") == 1
    assert sys.path == before


def test_files_of_one_name_in_two_folders_are_two_modules(folder):
    other = folder / "other"
    other.mkdir()
    (other / "model.py").write_text(
        "import torch\ndef batches():\n    return 12 * [torch.ones(2, 3, 8, 8)]\n"
    )
    data = "other/model.py:batches"
    result = run("quantize", STATIC, "--model", "model.py:factory", "--data", data)
    assert result.exit_code == 0, result.stderr


def test_missing_torch_is_a_usage_error():
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from qrecipe.__main__ import main\n"
        "for name in ('plan', 'compare', 'sensitivity', 'drift'):\n"
        "    data = () if name == 'plan' else ('--data', 'model.py:batches')\n"
        f"    sys.argv = ['qrecipe', name, '{STATIC}', '--model', 'model.py:factory', *data]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as error:\n"
        "        print(error.code)\n"
    )
    done = python("-c", code)
    assert done.stdout.split() == ["2"] * 4, done.stderr
    assert done.stderr.count("QR602 this command needs torch") == 4


# quantize


def test_quantize_as_json_is_one_document(folder):
    model = ("--model", "model.py:factory", "--data", "model.py:batches")
    result = run("quantize", STATIC, *model, "--evaluate", "model.py:accuracy", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    measured = {"metric", "tensor_bytes", "latency", "output_sqnr_db"}
    assert set(document) == {"plan", "calibration", *measured}
    assert document["calibration"] == {
        "batches": 10,
        "first_weight": pytest.approx(0.99**9),
        "clipping": None,
    }
    assert document["metric"] == {"name": "accuracy", "float": 4.0, "quantized": 4.0}
    assert document["tensor_bytes"]["quantized"] < document["tensor_bytes"]["float"]
    assert document["latency"]["ratio"] > 0
    assert document["output_sqnr_db"] > 15


def test_quantize_shows_warnings_as_plain_lines(folder):
    (folder / "few.py").write_text("import torch\ndef few():\n    yield torch.ones(2, 3, 8, 8)\n")
    result = run("quantize", STATIC, "--model", "model.py:training", "--data", "few.py:few")
    assert result.exit_code == 0, result.stderr
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert [line.split()[1] for line in warnings] == ["QR202", "QR201"]
    assert "QRecipeWarning" not in result.stderr


def test_static_recipe_without_data_asks_for_them(folder):
    result = run("quantize", STATIC, "--model", "model.py:factory")
    assert result.exit_code == 2
    assert "--data" in result.stderr


@pytest.mark.parametrize("factory", ["factory", "bare"])
def test_batches_with_labels_get_a_hint_for_the_command_line(folder, factory):
    model = f"model.py:{factory}"
    result = run("quantize", STATIC, "--model", model, "--data", "model.py:labelled")
    assert result.exit_code == 1
    assert "QR402" in result.stderr
    assert "without labels" in result.stderr
    assert "forward=" not in result.stderr


def test_evaluation_that_gives_no_number_says_so(folder):
    model = ("--model", "model.py:factory", "--data", "model.py:batches")
    result = run("quantize", STATIC, *model, "--evaluate", "model.py:named")
    assert result.exit_code == 1
    assert "QR601 named() returns a str, not a number" in result.stderr


# list, help


def test_list_names_recipes_observers_and_backends():
    document = json.loads(run("list", "--json").stdout)
    assert STATIC in [line["reference"] for line in document["recipes"]]
    observers = {line["name"]: line for line in document["observers"]}
    assert observers["histogram"]["arguments"] == ["bins"]
    backends = {line["name"]: line["available"] for line in document["backends"]}
    assert backends["tensorrt"] is False
    assert any(backends.values())
    text = run("list").stdout
    assert all(name in text for name in (STATIC, "histogram", "fused_moving_average", "tensorrt"))


def test_list_without_torch_says_what_it_cannot_tell(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    document = json.loads(run("list", "--json").stdout)
    assert {line["available"] for line in document["backends"]} == {None}


@pytest.mark.parametrize(
    "command", ["check", "show", "plan", "explain", "quantize", "list", "lock", "diff", "schema"]
)
def test_help_of_every_command_has_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"qrecipe {command} " in result.stdout.partition("Examples:")[2] + " "
    summary = next(line for line in run("--help").stdout.splitlines() if f"  {command} " in line)
    assert summary.endswith(".")
    assert not summary.endswith("...")


@pytest.mark.parametrize(
    "arguments", [("check",), ("chek", "x"), ("plan", STATIC), ("show", "--x")]
)
def test_wrong_usage_ends_with_status_two(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: qrecipe" in result.stderr


def test_version_is_printed():
    import qrecipe

    assert run("--version").stdout == f"qrecipe {qrecipe.__version__}\n"


def test_explain_as_json_gives_the_sites_that_a_name_stands_for(folder):
    result = run("explain", STATIC, "norm", "--model", "model.py:factory", "--json")
    document = json.loads(result.stdout)
    assert document["name"] == "norm"
    assert [site["name"] for site in document["sites"]] == ["conv"]
    assert document["sites"][0]["qconfig"]["weight"]["dtype"] == "int8"


def test_quantize_says_on_how_many_batches_and_what_the_first_of_them_weighs(folder):
    data = ["--model", "model.py:factory", "--data", "model.py:batches"]
    result = run("quantize", STATIC, *data)
    averaged = " ".join(result.stdout.split())
    assert "10 batches, of which the first weighs 91% in moving averages" in averaged
    assert 'QR234: use about 100 batches, or observe with "minmax"' in averaged
    assert "weighs" not in result.stderr
    accepted = f'format = 1\nextends = "{STATIC}"\nlint.ignore = ["QR208", "QR234"]\n'
    (folder / "small.toml").write_text(accepted)
    strict = run("quantize", "small.toml", *data, "--strict")
    assert strict.exit_code == 0, strict.stderr
    assert "QR234" not in strict.stdout
    extremes = " ".join(run("quantize", f"{STATIC}-minmax", *data).stdout.split())
    assert "Calibrated on 10 batches." in extremes


def test_quantize_says_where_it_wrote_the_model(folder):
    saving = ("quantize", DYNAMIC, "--model", "model.py:factory", "--out", "net.safetensors")
    assert run(*saving).stdout.endswith("\nwritten to net.safetensors\n")
    assert json.loads(run(*saving, "--force", "--json").stdout)


TOKENS = """
import torch
from torch import nn

def tokens():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)).eval()
"""


@pytest.mark.parametrize("command", [("plan", DYNAMIC), ("quantize", DYNAMIC), ("suggest",)])
def test_random_inputs_that_do_not_fit_are_explained(folder, command):
    (folder / "tokens.py").write_text(TOKENS)
    result = run(*command, "--model", "tokens.py:tokens", "--input", "2x3")
    sys.modules.pop("tokens", None)
    assert result.exit_code == 1
    assert "QR307" in result.stderr
    told = " ".join(result.stderr.split())
    assert "--input makes random float32 tensors" in told
    assert "return (model, example_inputs) from the function of --model" in told
