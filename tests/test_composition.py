"""``extends``: what merges, what conflicts, and what a recipe may refer to."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrecipe.composition import MAX_LAYERS
from qrecipe.errors import RecipeConflictError, RecipeError, RecipeReferenceError
from qrecipe.recipe import Recipe, load_recipe, parse_recipe
from qrecipe.references import builtin_names

BASE = """
format = 1
backend = "x86"
[tensor.weight]
observer = { name = "histogram", bins = 512 }
dtype = "int8"
qscheme = "per_tensor_symmetric"
[tensor.activation]
observer = "minmax"
dtype = "uint8"
[qconfig.int8]
weight = "weight"
activation = "activation"
[rules]
global = "int8"
[rules.module_name]
"conv1" = { qconfig = "float", reason = "sensitive" }
"conv2" = "float"
"""


def write(folder: Path, **texts: str) -> Path:
    """Recipes by name, beside a file that marks the tree."""
    (folder / "pyproject.toml").touch()
    for name, text in texts.items():
        (folder / f"{name}.toml").write_text(text)
    return folder


def load(folder: Path, name: str, monkeypatch) -> Recipe:
    monkeypatch.chdir(folder)
    return load_recipe(f"{name}.toml")


def findings_of(folder: Path, name: str, monkeypatch, error=RecipeError):
    with pytest.raises(error) as caught:
        load(folder, name, monkeypatch)
    return caught.value.findings


def test_tables_merge_by_key_and_values_are_replaced_whole(tmp_path, monkeypatch):
    write(
        tmp_path,
        base=BASE + '[lint]\nignore = ["QR200", "QR201"]\n',
        top="""
extends = "./base.toml"
[tensor.weight]
observer = "minmax"
[rules.module_name]
"conv1" = { qconfig = "int8" }
"fc" = "float"
[lint]
ignore = ["QR204"]
""",
    )
    recipe = load(tmp_path, "top", monkeypatch)
    weight = recipe.tensors["weight"]
    assert weight.observer is not None
    assert (weight.observer.name, weight.observer.arguments) == ("minmax", {})
    assert (weight.dtype, weight.qscheme) == ("int8", "per_tensor_symmetric")
    rules = {rule.key: rule for rule in recipe.rules}
    assert rules["conv1"].label == "int8"
    assert rules["conv1"].reason is None
    assert rules["conv2"].label == rules["fc"].label == "float"
    assert recipe.lint.ignore == ["QR204"]


def test_every_value_remembers_the_file_that_set_it(tmp_path, monkeypatch):
    write(tmp_path, base=BASE, top='extends = "./base.toml"\n[tensor.weight]\ndtype = "uint8"\n')
    recipe = load(tmp_path, "top", monkeypatch)
    assert str(recipe.origin("tensor.weight.dtype")) == "top.toml:3:1"
    assert str(recipe.origin("tensor.weight.qscheme")) == "base.toml:7:1"
    assert str(recipe.origin("tensor.weight.observer.bins")) == "base.toml:5:34"
    rule = next(rule for rule in recipe.rules if rule.tier == "global")
    assert (rule.layer, rule.overrides) == ("base.toml", frozenset())


def test_a_rule_of_the_extending_recipe_overrides_all_that_it_extends(tmp_path, monkeypatch):
    write(
        tmp_path,
        base=BASE,
        middle='extends = "./base.toml"',
        top='extends = "./middle.toml"\n[rules.module_name]\n"conv*" = "int8"\n',
    )
    rules = {rule.key: rule for rule in load(tmp_path, "top", monkeypatch).rules}
    assert rules["conv*"].layer == "top.toml"
    assert rules["conv*"].overrides == {"middle.toml", "base.toml"}
    assert rules["conv1"].overrides == frozenset()


def test_inherit_removes_the_rule_of_the_identical_key(tmp_path, monkeypatch):
    overlay = 'extends = "./base.toml"\n[rules.module_name]\n"conv1" = "inherit"\n'
    write(tmp_path, base=BASE, top=overlay)
    assert "conv1" not in {rule.key for rule in load(tmp_path, "top", monkeypatch).rules}


@pytest.mark.parametrize("extends", ['extends = "./base.toml"\n', ""])
def test_inherit_without_anything_to_inherit_is_an_error(tmp_path, monkeypatch, extends):
    write(tmp_path, base=BASE, top=extends + '[rules.module_name]\n"conv11" = "inherit"\n')
    finding = next(f for f in findings_of(tmp_path, "top", monkeypatch) if f.code == "QR125")
    assert finding.location.source == '"conv11" = "inherit"'
    assert ("conv1" in finding.hint) is bool(extends)


def test_a_removed_rule_cannot_be_removed_again(tmp_path, monkeypatch):
    overlay = '[rules.module_name]\n"conv1" = "inherit"\n'
    write(
        tmp_path,
        base=BASE,
        middle='extends = "./base.toml"\n' + overlay,
        top='extends = "./middle.toml"\n' + overlay,
    )
    (finding,) = findings_of(tmp_path, "top", monkeypatch, RecipeReferenceError)
    assert (finding.code, finding.location.file) == ("QR125", "top.toml")


def test_removing_the_global_rule_leaves_it_missing(tmp_path, monkeypatch):
    write(tmp_path, base=BASE, top='extends = "./base.toml"\n[rules]\nglobal = "inherit"\n')
    (finding,) = findings_of(tmp_path, "top", monkeypatch)
    assert (finding.code, finding.location.file) == ("QR103", "top.toml")


def test_bases_that_set_one_key_differently_conflict_and_both_places_are_shown(
    tmp_path, monkeypatch
):
    write(
        tmp_path,
        base=BASE,
        one='extends = "./base.toml"\n[rules.module_name]\n"fc" = "float"\n',
        two='extends = "./base.toml"\n[rules.module_name]\n"fc" = "int8"\n',
        top='extends = ["./one.toml", "./two.toml"]\n',
    )
    (finding,) = findings_of(tmp_path, "top", monkeypatch, RecipeConflictError)
    assert finding.code == "QR124"
    assert str(finding.location) == "one.toml:3:1"
    assert [str(place) for _, place in finding.related] == ["two.toml:3:1"]
    assert finding.notes == ("top.toml extends one.toml", "top.toml extends two.toml")


def test_a_recipe_that_extends_both_bases_settles_their_conflict(tmp_path, monkeypatch):
    write(
        tmp_path,
        one=BASE + '"fc" = "float"\n',
        two=BASE + '"fc" = "int8"\n',
        both='extends = ["./one.toml", "./two.toml"]\n[rules.module_name]\n"fc" = "float"\n',
        top='extends = ["./two.toml", "./both.toml"]\n',
    )
    rules = {rule.key: rule for rule in load(tmp_path, "top", monkeypatch).rules}
    assert (rules["fc"].label, rules["fc"].layer) == ("float", "both.toml")


def test_through_a_diamond_the_nearer_recipe_wins_over_the_far_one(tmp_path, monkeypatch):
    write(
        tmp_path,
        base=BASE,
        left='extends = "./base.toml"\nphase = "qat"\n[tensor.activation]\nreduce_range = true\n',
        right='extends = "./base.toml"\n[tensor.activation]\nobserver = "histogram"\n',
        top='extends = ["./right.toml", "./left.toml"]\n',
    )
    recipe = load(tmp_path, "top", monkeypatch)
    activation = recipe.tensors["activation"]
    assert activation.observer is not None
    assert activation.observer.name == "histogram"
    assert (activation.reduce_range, recipe.phase) == (True, "qat")


def test_equal_settings_and_differing_reasons_are_no_conflict(tmp_path, monkeypatch):
    one = BASE.replace("sensitive", "12 dB") + "[tensor.more]\ndtype = 'qint8'\nobserver='minmax'"
    two = BASE + "[tensor.more]\nobserver={name='minmax'}\ndtype='int8'"
    descriptions = ('description = "one"\n', 'description = "two"\n')
    write(
        tmp_path,
        one=descriptions[0] + one,
        two=descriptions[1] + two,
        top='extends = ["./one.toml", "./two.toml"]\n',
    )
    assert load(tmp_path, "top", monkeypatch).description == "one"


def test_a_circle_is_reported_with_its_chain(tmp_path, monkeypatch):
    write(
        tmp_path,
        one='extends = "./two.toml"\n',
        two='extends = "./three.toml"\n',
        three='extends = "./one.toml"\n',
    )
    (finding,) = findings_of(tmp_path, "one", monkeypatch, RecipeReferenceError)
    assert finding.code == "QR121"
    assert str(finding.location) == "three.toml:1:11"
    assert finding.notes == ("one.toml extends two.toml extends three.toml extends one.toml",)


def test_a_recipe_that_extends_itself_is_a_circle(tmp_path, monkeypatch):
    write(tmp_path, one='extends = "./one.toml"\n')
    (finding,) = findings_of(tmp_path, "one", monkeypatch)
    assert finding.code == "QR121"


def test_a_missing_base_names_the_nearest_file_and_the_chain(tmp_path, monkeypatch):
    write(tmp_path, base=BASE, middle='extends = "./bsae.toml"', top='extends = "./middle.toml"')
    (finding,) = findings_of(tmp_path, "top", monkeypatch, RecipeReferenceError)
    assert finding.code == "QR120"
    assert str(finding.location) == "middle.toml:1:11"
    assert finding.hint == 'did you mean "base.toml"?'
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
        ("./a\0b", "/"),
        ("./" + "x" * 5_000, None),
        (".\\base.toml", "builtin:NAME"),
    ],
)
def test_a_reference_that_leads_nowhere_says_what_to_write(tmp_path, monkeypatch, reference, hint):
    (tmp_path / "sub").mkdir()
    quoted = reference.replace("\\", "\\\\").replace("\0", "\\u0000")
    write(tmp_path, base=BASE, top=f'extends = "{quoted}"\n')
    (finding,) = findings_of(tmp_path, "top", monkeypatch, RecipeReferenceError)
    assert finding.code == "QR120"
    assert finding.location.line == 1
    assert hint is None or hint in finding.hint


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


def test_a_pin_holds_until_the_base_means_something_else(tmp_path, monkeypatch):
    write(tmp_path, base=BASE)
    fingerprint = load(tmp_path, "base", monkeypatch).fingerprint
    pinned = f'extends = {{ recipe = "./base.toml", sha256 = "{fingerprint}" }}\n'
    write(tmp_path, top=pinned, base="# a comment\n" + BASE.replace("sensitive", "12 dB"))
    assert load(tmp_path, "top", monkeypatch).fingerprint == fingerprint
    write(tmp_path, base=BASE.replace("512", "1024"))
    (finding,) = findings_of(tmp_path, "top", monkeypatch, RecipeReferenceError)
    assert finding.code == "QR123"
    assert finding.location.source[finding.location.column - 1 :].startswith(f'"{fingerprint}')
    assert load(tmp_path, "base", monkeypatch).fingerprint in finding.hint


def test_findings_of_the_whole_chain_come_in_one_run(tmp_path, monkeypatch):
    write(
        tmp_path,
        base=BASE.replace('"histogram"', '"histogramm"'),
        middle='extends = ["./base.toml", "./none.toml"]\nphas = "qat"\n',
        top='extends = "./middle.toml"\nbackend = "x68"\n[rules]\nglobal = "int9"\n',
    )
    findings = findings_of(tmp_path, "top", monkeypatch)
    assert [(finding.code, finding.location.file) for finding in findings] == [
        ("QR102", "top.toml"),
        ("QR120", "middle.toml"),
        ("QR101", "middle.toml"),
        ("QR104", "base.toml"),
    ]
    assert findings[-1].notes == ("top.toml extends middle.toml extends base.toml",)


def test_a_syntax_error_in_a_base_shows_the_chain(tmp_path, monkeypatch):
    write(tmp_path, base="format = = 1", top='extends = "./base.toml"\n')
    (finding,) = findings_of(tmp_path, "top", monkeypatch)
    assert (finding.code, str(finding.location)) == ("QR004", "base.toml:1:10")
    assert finding.notes == ("top.toml extends base.toml",)


def test_a_chain_without_end_is_cut(tmp_path, monkeypatch):
    count = MAX_LAYERS + 5
    chain = {f"r{i}": f'extends = "./r{i + 1}.toml"\n' for i in range(count)}
    write(tmp_path, **chain, **{f"r{count}": BASE})
    findings = findings_of(tmp_path, "r0", monkeypatch)
    assert [finding.code for finding in findings] == ["QR005"]


def test_a_ladder_of_diamonds_is_read_in_linear_time(tmp_path, monkeypatch):
    rungs = MAX_LAYERS // 2 - 1
    texts = {}
    for rung in range(rungs):
        below = f'extends = ["./a{rung + 1}.toml", "./b{rung + 1}.toml"]\n'
        texts |= {f"a{rung}": below, f"b{rung}": below}
    write(tmp_path, **texts, **{f"a{rungs}": BASE, f"b{rungs}": BASE})
    assert load(tmp_path, "a0", monkeypatch).backend == "x86"


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
    assert {"weight", "activation"} <= recipe.tensors.keys()
    assert "int8" in recipe.qconfigs


# --- recipes of installed distributions


def install(
    site: Path, monkeypatch, value: str, *, files: bool = True, editable: Path | None = None
):
    """A distribution ``acme-recipes`` that publishes ``cnn`` from the given package."""
    info = site / "acme_recipes-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-recipes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[qrecipe.recipes]\ncnn = {value}\n")
    record = "acme/vision/cnn.toml,,\nacme/vision/base.toml,,\nacme/secret.toml,,\n"
    (info / "RECORD").write_text(record if files else "")
    if editable is not None:
        url = f'{{"url": "{editable.as_uri()}", "dir_info": {{"editable": true}}}}'
        (info / "direct_url.json").write_text(url)
    package = (editable / "src" if editable else site) / "acme" / "vision"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "base.toml").write_text(BASE)
    (package / "cnn.toml").write_text('extends = "./base.toml"\nname = "cnn"\n')
    monkeypatch.syspath_prepend(str(site))
    return package


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


# --- any graph of recipes


@given(
    st.integers(2, 6).flatmap(
        lambda size: st.tuples(
            st.just(size),
            st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)), max_size=12),
            st.lists(st.none() | st.integers(0, 2), min_size=size, max_size=size),
        )
    )
)
@settings(max_examples=120, deadline=None)
def test_in_any_graph_the_unbeaten_setters_decide(tmp_path_factory, graph):
    size, edges, values = graph
    folder = tmp_path_factory.mktemp("graph")
    below = {
        i: sorted({b for a, b in edges if a == i < b} | ({i + 1} - {size} if i == 0 else set()))
        for i in range(size)
    }
    reach: dict[int, set[int]] = {}
    for i in reversed(range(size)):
        reach[i] = set(below[i]).union(*(reach[b] for b in below[i]))
    for i in range(size):
        bases = ", ".join(f'"./r{b}.toml"' for b in below[i])
        value = (
            ""
            if values[i] is None
            else f'[rules.module_name]\n"m" = {{ qconfig = "float", expect = {values[i]} }}'
        )
        head = 'format = 1\nbackend = "x86"\n' if i == 0 else ""
        global_ = '[rules]\nglobal = "float"\n' if i == 0 else ""
        (folder / f"r{i}.toml").write_text(f"{head}extends = [{bases}]\n{global_}{value}")
    setters = [i for i in {0} | reach[0] if values[i] is not None]
    standing = {i for i in setters if not any(i in reach[j] for j in setters)}
    outcomes = {values[i] for i in standing}
    path = folder / "r0.toml"
    if len(outcomes) > 1:
        with pytest.raises(RecipeConflictError):
            load_recipe(path)
    else:
        found = {rule.expect for rule in load_recipe(path).rules if rule.key == "m"}
        assert found == outcomes


def test_the_order_of_extends_does_not_matter(tmp_path, monkeypatch):
    parts = {
        "one": BASE,
        "two": 'phase = "qat"\n',
        "three": '[rules.function]\n"torch.add" = "float"\n',
    }
    fingerprints = set()
    for order in itertools.permutations(parts):
        listed = ", ".join(f'"./{name}.toml"' for name in order)
        write(tmp_path, **parts, top=f"extends = [{listed}]\n")
        fingerprints.add(load(tmp_path, "top", monkeypatch).fingerprint)
    assert len(fingerprints) == 1
    assert os.listdir(tmp_path)
