"""Recipes that installed distributions publish: who, in which version, in every report."""

from __future__ import annotations

import json

import pytest
import torch
from nets import NETS, Mlp
from plans import ROWS
from recipe_files import BASE, findings_of, install, load, write
from runs import silent
from shares import every
from typer.testing import CliRunner

import qrecipe
from qrecipe.cli.app import app
from qrecipe.errors.findings import RecipeReferenceError
from qrecipe.execution.provenance import provenance
from qrecipe.measure.pages.reports import drift_page
from qrecipe.recipe.recipe import load_recipe

CNN = "acme-recipes:cnn"
PLAIN = BASE.partition("[rules.module_name]")[0].replace(
    "[tensor.activation]\n", "[tensor.activation]\nreduce_range = true\n"
)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The package of acme-recipes 1.0, whose base decides no module by name."""
    package = install(tmp_path / "site", monkeypatch, "acme.vision")
    (package / "base.toml").write_text(PLAIN)
    return package


@pytest.fixture
def top(tmp_path, monkeypatch, published):
    """A recipe of the user's own that extends a published one."""
    folder = tmp_path / "own"
    folder.mkdir()
    write(folder, top=f'format = 1\nname = "top"\nextends = "{CNN}"\n')
    monkeypatch.chdir(folder)
    return folder


def test_a_recipe_knows_every_file_that_it_is_made_of_and_who_published_it(top):
    recipe = load_recipe("top.toml")
    assert [each.title for each in recipe.ingredients] == [
        "top.toml",
        "acme-recipes:cnn (acme-recipes 1.0)",
        "acme/vision/base.toml (acme-recipes 1.0)",
    ]
    itself, cnn, _ = recipe.ingredients
    assert itself.fingerprint == recipe.fingerprint
    assert cnn.fingerprint == load_recipe(CNN).fingerprint
    assert cnn.publisher.version == "1.0"


def test_shipped_recipes_name_no_publisher_for_their_version_is_that_of_qrecipe():
    recipe = load_recipe("builtin:x86-static-histogram")
    assert [each.name for each in recipe.ingredients] == [
        "builtin:x86-static-histogram",
        "builtin:x86-static",
    ]
    assert {each.publisher for each in recipe.ingredients} == {None}


def test_a_plan_its_json_its_explanation_and_the_provenance_name_the_publisher(top):
    model = Mlp().eval()
    plan = qrecipe.plan(model, "top.toml", ROWS)
    lines = str(plan).splitlines()
    assert lines[1:3] == [
        "with acme-recipes:cnn (acme-recipes 1.0)",
        "with acme/vision/base.toml (acme-recipes 1.0)",
    ]
    ingredient = json.loads(plan.to_json())["ingredients"][1]
    assert (ingredient["distribution"], ingredient["version"]) == ("acme-recipes", "1.0")
    assert "with acme-recipes:cnn (acme-recipes 1.0)" in plan.explain("fc1")
    net = NETS["mlp"]
    converted = qrecipe.quantize(net.model(), "top.toml", net.batches(10))
    provenance = qrecipe.provenance(converted)
    assert provenance.versions["acme-recipes"] == "1.0"
    assert provenance.versions["torch"] == torch.__version__
    assert json.loads(provenance.plan)["ingredients"][1] == ingredient


def test_show_names_the_publisher_as_text_and_as_json(top):
    text = CliRunner().invoke(app, ["show", "top.toml"]).stdout
    fingerprint = load_recipe(CNN).fingerprint
    assert f"# extends {CNN} (acme-recipes 1.0), fingerprint {fingerprint}\n" in text
    shown = json.loads(CliRunner().invoke(app, ["show", "--json", "top.toml"]).stdout)
    assert [each["version"] for each in shown["ingredients"]] == [None, "1.0", "1.0"]


WITH = [
    "with acme-recipes:cnn (acme-recipes 1.0)",
    "with acme/vision/base.toml (acme-recipes 1.0)",
]


def compared(model, recipe, batches):
    return qrecipe.compare(model, quantized(model, recipe, batches), batches[:2], progress=silent)


def drifted(model, recipe, batches):
    return qrecipe.drift(quantized(model, recipe, batches), batches, progress=silent)


def ranked(model, recipe, batches):
    return qrecipe.sensitivity(model, recipe, batches, progress=silent)


def tuned(model, recipe, batches):
    return qrecipe.tune(model, recipe, batches, lambda _: 1.0, max_trials=1, progress=silent)


def quantized(model, recipe, batches):
    return qrecipe.quantize(model, recipe, batches, progress=silent)


@pytest.mark.parametrize("measured", [compared, drifted, ranked, tuned])
def test_each_report_on_a_model_names_the_publisher_as_text_and_as_json(top, measured):
    net = NETS["mlp"]
    report = measured(net.model(), "top.toml", net.batches(10))
    assert str(report).splitlines()[-2:] == WITH
    ingredients = json.loads(report.to_json())["ingredients"]
    assert [(each["distribution"], each["version"]) for each in ingredients] == [
        (None, None),
        *(2 * [("acme-recipes", "1.0")]),
    ]


@pytest.mark.parametrize("measured", every(2, [compared, drifted, ranked, tuned]))
def test_a_report_on_a_recipe_of_the_users_own_names_no_publisher(top, measured):
    (top / "own.toml").write_text(PLAIN)
    net = NETS["mlp"]
    report = measured(net.model(), "own.toml", net.batches(10))
    assert not [line for line in str(report).splitlines() if line.startswith("with ")]
    (own,) = json.loads(report.to_json())["ingredients"]
    assert (own["name"], own["distribution"], own["version"]) == ("own.toml", None, None)


def test_the_reports_on_a_model_that_was_loaded_name_the_publisher(top):
    net = NETS["mlp"]
    model, batches = net.model(), net.batches(10)
    qrecipe.save_quantized(quantized(model, "top.toml", batches), "model.safetensors")
    loaded = qrecipe.load_quantized("model.safetensors", model)
    for report in (
        qrecipe.drift(loaded, batches, progress=silent),
        qrecipe.compare(model, loaded, batches[:1], progress=silent),
    ):
        assert str(report).splitlines()[-2:] == WITH


def test_the_page_of_a_report_names_files_and_publisher_among_the_versions(top, undrawn):
    net = NETS["mlp"]
    model, batches = net.model(), net.batches(10)
    rows = {}
    for recipe in ("top.toml", "builtin:x86-static"):
        converted = quantized(model, recipe, batches)
        report = qrecipe.drift(converted, batches, progress=silent)
        versions = drift_page(report, provenance(converted), {}).sections[-2]
        rows[recipe] = [tuple(row) for row in versions.rows]
    assert ("acme-recipes:cnn", "acme-recipes 1.0") in rows["top.toml"]
    assert ("acme/vision/base.toml", "acme-recipes 1.0") in rows["top.toml"]
    names = [name for name, _ in rows["builtin:x86-static"]]
    assert names == ["fingerprint of the recipe", "qrecipe", "torch", "python"]


def test_the_explanation_of_a_module_names_the_publisher_as_that_of_a_site_does(top):
    plan = qrecipe.plan(Mlp().eval(), "top.toml", ROWS)
    assert plan.explain("").splitlines()[-2:] == WITH
    assert plan.explain("fc1").splitlines()[-2:] == WITH


def test_check_names_the_publisher_as_text_and_as_json(top):
    (top / "own.toml").write_text(PLAIN)
    result = CliRunner().invoke(app, ["check", "own.toml", "top.toml"])
    assert result.stdout.splitlines() == [
        *(f"top.toml {line}" for line in WITH),
        "2 recipes checked: no errors",
    ]
    document = json.loads(CliRunner().invoke(app, ["check", "--json", "own.toml", CNN]).stdout)
    own, cnn = document["recipes"]
    assert [each["version"] for each in own["ingredients"]] == [None]
    assert [each["version"] for each in cnn["ingredients"]] == ["1.0", "1.0"]
    assert document["findings"] == []


def test_diff_names_the_publisher_as_text_and_as_json(top):
    (top / "own.toml").write_text(PLAIN)
    lines = CliRunner().invoke(app, ["diff", "own.toml", "top.toml"]).stdout.splitlines()
    assert [line for line in lines if "with" in line] == [f"top.toml {line}" for line in WITH]
    document = json.loads(CliRunner().invoke(app, ["diff", "--json", "own.toml", CNN]).stdout)
    assert [each["version"] for each in document["a"]["ingredients"]] == [None]
    assert [each["distribution"] for each in document["b"]["ingredients"]] == 2 * ["acme-recipes"]


@pytest.mark.parametrize("is_broken", [False, True])
def test_list_names_the_publisher_of_a_recipe_though_it_cannot_be_used(published, is_broken):
    if is_broken:
        (published / "cnn.toml").write_text("format = ")
    text = CliRunner().invoke(app, ["list"]).stdout
    (line,) = (line for line in text.splitlines() if line.startswith(CNN))
    assert line.startswith(f"{CNN} (acme-recipes 1.0) ")
    document = json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)
    publishers = {r["reference"]: (r["distribution"], r["version"]) for r in document["recipes"]}
    assert publishers[CNN] == ("acme-recipes", "1.0")
    assert publishers["builtin:x86-static"] == (None, None)
    assert "builtin:x86-static (" not in text


def test_the_chain_of_an_error_in_a_published_recipe_names_distribution_and_version(
    top, published, monkeypatch
):
    (published / "base.toml").write_text(BASE.replace('"x86"', '"x87"'))
    (finding,) = findings_of(top, "top", monkeypatch)
    assert finding.notes == (
        "top.toml extends acme-recipes:cnn (acme-recipes 1.0) "
        "extends acme/vision/base.toml (acme-recipes 1.0)",
    )
    (published / "cnn.toml").write_text('backend = "x87"')
    with pytest.raises(qrecipe.RecipeError, match=r"acme-recipes:cnn \(acme-recipes 1\.0\)"):
        load_recipe(CNN)


def test_a_changed_pin_names_the_version_that_is_installed(top, monkeypatch):
    pin = "0" * 64
    write(top, top=f'extends = {{ recipe = "{CNN}", sha256 = "{pin}" }}')
    (finding,) = findings_of(top, "top", monkeypatch)
    assert finding.code == "QR123"
    assert finding.message == '"acme-recipes:cnn (acme-recipes 1.0)" differs from its pin'
    assert finding.hint == f"its fingerprint is {load_recipe(CNN).fingerprint}"


def test_a_pin_that_fits_holds_over_another_version_with_equal_values(top, tmp_path, monkeypatch):
    write(top, top=f'extends = {{ recipe = "{CNN}", sha256 = "{load_recipe(CNN).fingerprint}" }}')
    assert load(top, "top", monkeypatch).backend == "x86"
    old = tmp_path / "site" / "acme_recipes-1.0.dist-info"
    metadata = old / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "1.1"))
    assert load_recipe("top.toml").ingredients[1].publisher.version == "1.1"


def test_a_missing_distribution_is_named_with_the_chain(tmp_path, monkeypatch):
    write(tmp_path, top='extends = "acme-recipes:cnn"')
    (finding,) = findings_of(tmp_path, "top", monkeypatch, RecipeReferenceError)
    assert finding.code == "QR120"
    assert '"acme-recipes", which is not installed' in finding.message
    assert str(finding.location) == "top.toml:1:11"
    assert finding.notes == ('top.toml extends "acme-recipes:cnn"',)


def test_two_versions_of_one_distribution_are_refused_and_both_places_named(
    top, tmp_path, monkeypatch
):
    install(tmp_path / "other", monkeypatch, "acme.vision", version="2.0")
    (finding,) = findings_of(top, "top", monkeypatch, RecipeReferenceError)
    assert finding.code == "QR120"
    assert '"acme-recipes" is installed 2 times' in finding.message
    for version, folder in (("1.0", "site"), ("2.0", "other")):
        assert f"{version} in {tmp_path / folder}" in finding.message
    assert finding.hint == "uninstall all but one"


def test_one_version_in_two_places_is_refused_only_where_the_recipes_differ(
    published, tmp_path, monkeypatch
):
    other = install(tmp_path / "other", monkeypatch, "acme.vision")
    assert load_recipe(CNN).name == "cnn"
    (other / "cnn.toml").write_text('extends = "./base.toml"\nname = "another"\n')
    with pytest.raises(RecipeReferenceError, match="is published twice with different contents"):
        load_recipe(CNN)
    (other / "cnn.toml").unlink()
    assert load_recipe(CNN).name == "cnn"


def test_a_search_path_that_names_one_place_twice_is_no_second_distribution(
    published, tmp_path, monkeypatch
):
    (tmp_path / "link").symlink_to(tmp_path / "site")
    for folder in ("site", "link"):
        monkeypatch.syspath_prepend(str(tmp_path / folder))
    assert load_recipe(CNN).name == "cnn"


@pytest.mark.parametrize("content", [None, b"", b"Name: acme-recipes\nVersion: \xff\xfe\n"])
def test_damaged_metadata_are_a_finding(published, tmp_path, content):
    metadata = tmp_path / "site" / "acme_recipes-1.0.dist-info" / "METADATA"
    metadata.unlink()
    if content is not None:
        metadata.write_bytes(content)
    with pytest.raises(RecipeReferenceError, match='metadata of "acme-recipes" is damaged'):
        load_recipe(CNN)


def test_a_version_cannot_steer_the_terminal(published, tmp_path):
    metadata = tmp_path / "site" / "acme_recipes-1.0.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: acme-recipes\nVersion: 1\x1b[2J\n")
    assert "\x1b" not in load_recipe(CNN).ingredients[0].title
