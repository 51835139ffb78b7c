"""``qrecipe check FOLDER``: its recipes, whatever else is there."""

from __future__ import annotations

import json

from command_line import STATIC, TOP, run

PART = '[tensor.wide]\nobserver = "histogram"\ndtype = "uint8"\nqscheme = "per_tensor_affine"\n'
OTHERS = {
    "pyproject.toml": '[project]\nname = "mine"\n',
    "ruff.toml": '[format]\nquote-style = "double"\n[lint]\nselect = ["E"]\n',
    "leaks.toml": '[[rules]]\nid = "key"\n',
    "cnn.lock.toml": "lock = 1\n",
    ".venv/bad.toml": "format = 2\n",
    "env/pyvenv.cfg": "",
    "env/bad.toml": "format = 2\n",
}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def checked(folder, *options):
    result = run("check", folder, "--json", *options)
    document = json.loads(result.stdout)
    names = [each["recipe"].removeprefix(f"{folder}/") for each in document["recipes"]]
    codes = [
        (each["recipe"].removeprefix(f"{folder}/"), each["code"]) for each in document["findings"]
    ]
    return names, codes, result.exit_code


def test_the_recipes_in_it_and_below_are_checked_and_no_other_toml(tmp_path):
    write(tmp_path, {"cnn.toml": TOP, "more/deep/rnn.toml": TOP, **OTHERS})
    assert checked(tmp_path) == (["cnn.toml", "more/deep/rnn.toml"], [], 0)


def test_a_recipe_is_known_by_what_it_holds_even_if_something_is_wrong(tmp_path):
    files = {
        "new.toml": "format = 2\n",
        "odd.toml": "format = 1\n[rulez]\n",
        "torn.toml": "a = [\n",
    }
    write(tmp_path, files)
    names, codes, status = checked(tmp_path)
    assert (names, status) == ([*files], 1)
    assert {name for name, _ in codes} == {*files}


def test_a_part_that_others_extend_need_not_be_whole(tmp_path):
    whole = f'format = 1\nextends = ["{STATIC}", "./part.toml"]\n[rules.module_name]\n'
    whole += '"a" = { weight = "weight", activation = "wide" }\n'
    write(tmp_path, {"part.toml": PART, "whole.toml": whole})
    assert checked(tmp_path) == (["part.toml", "whole.toml"], [], 0)
    assert run("check", tmp_path / "part.toml").exit_code == 1
    (tmp_path / "whole.toml").unlink()
    assert checked(tmp_path)[2] == 1


def test_a_folder_without_a_recipe_is_named(tmp_path):
    write(tmp_path, OTHERS)
    result = run("check", tmp_path)
    assert result.exit_code == 2
    assert "there is no recipe in this folder" in " ".join(result.stderr.split())
