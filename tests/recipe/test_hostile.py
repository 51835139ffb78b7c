"""Any hostile input ends in a result or in an error of ours; `tools/fuzz.py` tries more of it."""

from __future__ import annotations

import shutil
from functools import partial
from random import Random

import hostile
import hostile_artifacts
import pytest
import tomli
from artifacts import quantized, recipe, stored
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS

import qrecipe
from qrecipe.authoring.lock.file import MAX_ITEMS as MOST_LOCKED
from qrecipe.authoring.lock.file import lock_text, make_lock, read_lock
from qrecipe.errors.findings import ArtifactError, PlanError, QRecipeError
from qrecipe.recipe.toml.document import MAX_ITEMS
from qrecipe.recipe.toml.size_limits import depth, item_count, longest_key, outline

SEEDS = st.integers(0, 2**48)


def many(count):
    return settings(max_examples=count, deadline=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile").resolve()


@pytest.fixture(scope="module")
def artifact(folder):
    return stored(folder, "mlp").read_bytes()


@pytest.fixture(scope="module")
def lock(folder):
    net = NETS["mlp"]
    plan = qrecipe.plan(net.model(), recipe(), net.batches()[0])
    return lock_text(make_lock(plan, folder / "recipe.lock"))


@pytest.fixture(scope="module")
def load():
    return partial(qrecipe.load_quantized, model=NETS["mlp"].model())


@given(seed=SEEDS)
@many(80)
def test_any_recipe_is_taken_or_refused_in_our_words(folder, seed):
    hostile.recipe_case(Random(seed), folder)


@given(seed=SEEDS)
@many(60)
def test_any_references_stay_inside_the_tree(folder, seed):
    hostile.reference_case(Random(seed), folder)


@given(seed=SEEDS)
@many(100)
def test_any_pattern_matches_any_name_or_is_none(folder, seed):
    hostile.pattern_case(Random(seed), folder)


@given(seed=SEEDS)
@many(30)
def test_any_artifact_is_taken_or_refused_in_our_words(folder, artifact, load, seed):
    hostile_artifacts.artifact_case(Random(seed), folder, artifact, load)


@given(seed=SEEDS)
@many(40)
def test_any_lock_file_is_taken_or_refused_in_our_words(folder, lock, seed):
    hostile.lock_case(Random(seed), folder, lock)


@given(st.text(alphabet="\"'#=,[]{}.\\\n ax", max_size=60))
@many(200)
def test_counting_never_tells_less_than_toml_holds(written):
    try:
        data = tomli.loads(written)
    except ValueError:
        return
    assert item_count(outline(written)) >= values_in(data)


def values_in(value):
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    elements = len(value) - 1 if isinstance(value, list) and value else len(inside)
    return elements + sum(map(values_in, inside))


def test_what_strings_and_comments_hold_is_not_counted():
    marks = "=,[.{" * 50
    text = f'a = "{marks}\\"{marks}" # {marks}\nb = \'{marks}\'\n'
    text += f'c = """{marks}\n"{marks}\\"""{marks}""""\nd = \'\'\'{marks}\'\n{marks}\'\'\'\n'
    assert item_count(outline(text)) == 4
    assert depth(outline(text)) == 0
    assert longest_key(outline(text)) == 1


@pytest.mark.parametrize("open_quote", ['"""', "'''", '"', "'", '"""\\'])
def test_an_open_string_is_counted_in_one_pass(open_quote):
    assert item_count(outline(f"a = {open_quote}" + "x = 1," * 200_000)) <= 400_001


def rules(count, name="k"):
    return "[rules.module_name]\n" + "".join(f"{name}{i} = 'float'\n" for i in range(count))


HEAD = "format = 1\nbackend = 'x86'\n[rules]\nglobal = 'float'\n"


def test_a_recipe_may_hold_as_much_as_is_promised_and_no_more():
    assert len(qrecipe.parse_recipe(HEAD + rules(MAX_ITEMS - 10)).rules) == MAX_ITEMS - 9
    with pytest.raises(
        QRecipeError, match=r"(?s)QR002 the recipe has more than 20,000 keys.*one glob"
    ):
        qrecipe.parse_recipe(HEAD + rules(MAX_ITEMS))


def test_bases_count_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qrecipe.recipe.extends.MAX_ITEMS", 2_000)
    for name, base in (("a", None), ("b", "a"), ("c", "b")):
        extends = f"extends = './{base}.toml'\n" if base else ""
        (tmp_path / f"{name}.toml").write_text(extends + HEAD + rules(800, name))
    assert len(qrecipe.load_recipe("b.toml").rules) == 1_601
    with pytest.raises(QRecipeError) as caught:
        qrecipe.load_recipe("c.toml")
    (finding,) = caught.value.findings
    assert finding.message == "the recipes have more than 2,000 keys and values in total"
    assert finding.notes == ("c.toml extends b.toml extends a.toml",)


def test_a_lock_that_could_not_be_read_again_is_refused(tmp_path, lock):
    path = tmp_path / "recipe.lock"
    path.write_text(lock + "".join(f"k{i} = 1\n" for i in range(MOST_LOCKED)))
    with pytest.raises(PlanError, match="QR321"):
        read_lock(path)


def test_a_model_that_could_not_be_read_again_is_not_stored(tmp_path, monkeypatch):
    monkeypatch.setattr("qrecipe.artifact.container.MAX_VALUES", 100)
    with pytest.raises(ArtifactError, match="QR511 the model cannot be stored"):
        qrecipe.save_quantized(quantized(NETS["mlp"], recipe()), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_cases_reach_what_they_are_made_for(folder, artifact, load, lock):
    """A suite whose cases all fail at the first character would show nothing."""
    cases = {
        hostile.recipe_case: {"QR003", "QR004", "QR101", "QR103", "accepted"},
        hostile.reference_case: {"QR120", "QR121", "QR122", "accepted"},
        hostile.pattern_case: {"QR110", "accepted"},
        partial(hostile_artifacts.artifact_case, good=artifact, load=load): {"QR503", "QR505"},
        partial(hostile.lock_case, good=lock): {"QR321", "accepted"},
    }
    for case, wanted in cases.items():
        found, seeds = set(), iter(range(80))
        while not wanted <= found:
            found |= set(case(Random(next(seeds)), folder).codes)
    shutil.rmtree(folder / "tree")
