"""What a recipe may refer to: files of its tree, shipped recipes, installed distributions."""

from __future__ import annotations

import os
import sys

import pytest
from recipe_files import BASE, findings_of, install, load, write

from qrecipe.errors.findings import RecipeReferenceError
from qrecipe.recipe.recipe import load_recipe, parse_recipe
from qrecipe.recipe.references import builtin_names


def test_a_missing_base_names_the_nearest_file_and_the_chain(tmp_path, monkeypatch):
    write(tmp_path, base=BASE, middle='extends = "./bsae.toml"', top='extends = "./middle.toml"')
    (finding,) = findings_of(tmp_path, "top", monkeypatch, RecipeReferenceError)
    assert finding.code == "QR120"
    assert str(finding.location) == "middle.toml:1:11"
    assert finding.hint == 'did you mean "./base.toml"?'
    assert finding.notes == ('top.toml extends middle.toml extends "./bsae.toml"',)


@pytest.mark.parametrize(
    ("reference", "hint"),
    [
        ("x86-static", 'did you mean "builtin:x86-static"?'),
        ("builtin:x86-sttic", 'did you mean "builtin:x86-static"?'),
        ("base.toml", 'did you mean "./base.toml"?'),
        ("no-such-distribution:x86-static", 'did you mean "builtin:x86-static"?'),
        ("pydantic:cnn", "it publishes none"),
        ("https://example.org/x.toml", "builtin:NAME"),
        ("", "builtin:NAME"),
        ("./sub", None),
        ("./toq.toml", None),
        ("./sub/bsae.toml", 'did you mean "./sub/base.toml"?'),
        ("./a\0b", "/"),
        ("./" + "x" * 5_000, None),
        (".\\base.toml", "builtin:NAME"),
    ],
)
def test_a_reference_that_leads_nowhere_says_what_to_write(tmp_path, monkeypatch, reference, hint):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "base.toml").touch()
    os.mkfifo(tmp_path / "toqq.toml")
    quoted = reference.replace("\\", "\\\\").replace("\0", "\\u0000")
    write(tmp_path, base=BASE, top=f'extends = "{quoted}"\n')
    (finding,) = findings_of(tmp_path, "top", monkeypatch, RecipeReferenceError)
    assert finding.code == "QR120"
    assert finding.location.line == 1
    assert finding.hint is None if hint is None else hint in finding.hint


def test_a_base_that_is_no_regular_file_is_said_to_be_none(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.toml")
    write(tmp_path, pipes=BASE, top='extends = "./pipe.toml"\n')
    (finding,) = findings_of(tmp_path, "top", monkeypatch, RecipeReferenceError)
    assert (finding.message, finding.hint) == ('"./pipe.toml" is not a regular file', None)


def test_a_recipe_from_a_pipe_is_said_to_be_no_regular_file():
    reader, writer = os.pipe()
    os.write(writer, BASE.encode())
    os.close(writer)
    with pytest.raises(RecipeReferenceError, match="it is not a regular file"):
        load_recipe(f"/dev/fd/{reader}")
    os.close(reader)


def test_a_file_whose_name_no_plan_could_hold_is_refused(tmp_path):
    path = os.fsencode(tmp_path) + b"/n\xff.toml"
    with open(path, "w", encoding="utf-8") as file:
        file.write(BASE)
    with pytest.raises(RecipeReferenceError) as caught:
        load_recipe(os.fsdecode(path))
    (finding,) = caught.value.findings
    assert finding.code == "QR001"
    assert "its name is not UTF-8 text" in finding.message
    assert finding.hint == "rename the file"


def test_a_missing_file_is_answered_with_the_nearest_as_it_has_to_be_written(tmp_path):
    write(tmp_path, base=BASE)
    with pytest.raises(RecipeReferenceError) as caught:
        load_recipe(tmp_path / "bsae.toml")
    assert caught.value.findings[0].hint == f'did you mean "{tmp_path}/base.toml"?'


@pytest.mark.parametrize(
    "reference",
    [
        "../outside.toml",
        "./sub/../../outside.toml",
        "./link.toml",
        "./folder/outside.toml",
        "/etc/passwd",
        "~/outside.toml",
        "C:\\\\outside.toml",
        "c:/outside.toml",
        "\\\\\\\\server\\\\share\\\\outside.toml",
        "//server/share/outside.toml",
    ],
)
def test_a_base_outside_the_tree_is_refused(tmp_path, monkeypatch, reference):
    (tmp_path / "outside.toml").write_text(BASE)
    project = tmp_path / "project"
    (project / "sub").mkdir(parents=True)
    (project / "link.toml").symlink_to(tmp_path / "outside.toml")
    (project / "folder").symlink_to(tmp_path)
    write(project, top=f'extends = "{reference}"\n')
    (finding,) = findings_of(project, "top", monkeypatch, RecipeReferenceError)
    assert finding.code == "QR122"


def test_the_tree_is_the_project_and_without_one_the_folder(tmp_path, monkeypatch):
    (tmp_path / "base.toml").write_text(BASE)
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "top.toml").write_text('extends = "../base.toml"\n')
    (finding,) = findings_of(folder, "top", monkeypatch, RecipeReferenceError)
    assert finding.code == "QR122"
    (tmp_path / ".git").mkdir()
    recipe = load(folder, "top", monkeypatch)
    assert str(recipe.origin("backend")) == "../base.toml:3:1"
    monkeypatch.chdir(tmp_path)
    assert str(load_recipe("recipes/top.toml").origin("backend")) == "base.toml:3:1"


def test_links_inside_the_tree_are_followed_and_name_one_file(tmp_path, monkeypatch):
    write(tmp_path, base=BASE, top='extends = ["./base.toml", "./alias.toml"]')
    (tmp_path / "alias.toml").symlink_to("base.toml")
    assert {rule.layer for rule in load(tmp_path, "top", monkeypatch).rules} == {"base.toml"}
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    write(tmp_path, top='extends = "./loop.toml"')
    assert findings_of(tmp_path, "top", monkeypatch)[0].code == "QR120"


def test_a_text_without_a_path_extends_shipped_recipes_only(tmp_path):
    assert parse_recipe('extends = "builtin:x86-static"').name == "x86-static"
    with pytest.raises(RecipeReferenceError, match="path="):
        parse_recipe('extends = "./base.toml"')
    write(tmp_path, base=BASE)
    text = 'extends = "./base.toml"\nphase = "qat"\n'
    assert parse_recipe(text, tmp_path / "new.toml").phase == "qat"


@pytest.mark.parametrize("name", builtin_names())
def test_every_shipped_recipe_loads_and_describes_itself(name):
    recipe = load_recipe(f"builtin:{name}")
    assert recipe.name == name
    assert (recipe.path, recipe.reference) == (None, f"builtin:{name}")
    assert recipe.description is not None
    used = {rule.label for rule in recipe.rules} - {"float"}
    assert used
    assert used <= recipe.qconfigs.keys()


# --- recipes of installed distributions


@pytest.mark.parametrize("is_editable", [False, True])
def test_an_installed_distribution_publishes_recipes_without_being_imported(
    tmp_path, monkeypatch, is_editable
):
    editable = tmp_path / "project" if is_editable else None
    install(tmp_path / "site", monkeypatch, "acme.vision", files=not is_editable, editable=editable)
    recipe = load_recipe("acme-recipes:cnn")
    assert (recipe.name, recipe.reference) == ("cnn", "acme-recipes:cnn")
    assert str(recipe.origin("backend")) == "acme/vision/base.toml:3:1"
    assert "acme" not in sys.modules
    assert parse_recipe('extends = "Acme_Recipes:cnn"').backend == "x86"
    with pytest.raises(RecipeReferenceError, match='did you mean "cnn"'):
        load_recipe("acme-recipes:cmn")


@pytest.mark.parametrize("value", ["os:system", "acme", "../acme", "acme.missing", "acme.vision:x"])
def test_a_distribution_that_publishes_something_else_is_refused(tmp_path, monkeypatch, value):
    install(tmp_path / "site", monkeypatch, value)
    with pytest.raises(RecipeReferenceError, match="QR120"):
        load_recipe("acme-recipes:cnn")


def test_damaged_entry_points_of_a_distribution_are_a_finding(tmp_path, monkeypatch):
    install(tmp_path / "site", monkeypatch, "acme.vision")
    damaged = "[qrecipe.recipes]\nno equals sign\n"
    (tmp_path / "site" / "acme_recipes-1.0.dist-info" / "entry_points.txt").write_text(damaged)
    with pytest.raises(RecipeReferenceError, match='metadata of "acme-recipes" is damaged'):
        load_recipe("acme-recipes:cnn")


def test_a_published_recipe_stays_inside_its_package(tmp_path, monkeypatch):
    package = install(tmp_path / "site", monkeypatch, "acme.vision")
    (tmp_path / "site" / "other.toml").write_text(BASE)
    (package / "cnn.toml").write_text('extends = "../../other.toml"\n')
    with pytest.raises(RecipeReferenceError, match="QR122"):
        load_recipe("acme-recipes:cnn")
    (package / "cnn.toml").unlink()
    (package / "cnn.toml").symlink_to(tmp_path / "site" / "other.toml")
    with pytest.raises(RecipeReferenceError, match="QR120"):
        load_recipe("acme-recipes:cnn")
