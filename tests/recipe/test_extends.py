"""``extends``: what merges and what conflicts."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipe_files import BASE, findings_of, load, write

from qrecipe.errors.findings import RecipeConflictError, RecipeReferenceError
from qrecipe.recipe.extends import MAX_LAYERS
from qrecipe.recipe.recipe import load_recipe


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
    assert recipe.lint.ignore == ("QR204",)


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
    assert finding.hint == '"middle.toml" has already removed this rule'


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
    symmetric = "qscheme = 'per_tensor_symmetric'\n"
    one = (
        BASE.replace("sensitive", "12 dB")
        + "[tensor.more]\ndtype = 'qint8'\nobserver='minmax'\n"
        + symmetric
    )
    two = BASE + "[tensor.more]\nobserver={name='minmax'}\ndtype='int8'\n" + symmetric
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
    assert finding.hint == "move what both need into a third recipe, and extend that"
    assert finding.notes == ("one.toml extends two.toml extends three.toml extends one.toml",)


def test_a_recipe_that_extends_itself_is_a_circle(tmp_path, monkeypatch):
    write(tmp_path, one='extends = "./one.toml"\n')
    (finding,) = findings_of(tmp_path, "one", monkeypatch)
    assert finding.code == "QR121"


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


def test_a_pin_that_differs_shows_the_chain_of_the_recipe_that_pins(tmp_path, monkeypatch):
    write(tmp_path, base=BASE)
    right = load(tmp_path, "base", monkeypatch).fingerprint
    pinned = 'extends = { recipe = "./base.toml", sha256 = "%s" }\n'
    top = f'extends = [{{ recipe = "./base.toml", sha256 = "{right}" }}, "./other.toml"]\n'
    write(tmp_path, other=pinned % ("0" * 64), top=top)
    (finding,) = findings_of(tmp_path, "top", monkeypatch, RecipeReferenceError)
    assert (finding.code, finding.location.file) == ("QR123", "other.toml")
    assert finding.notes == ("top.toml extends other.toml extends base.toml",)


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
