"""A recipe's text -> Recipe: what it holds, what is refused, and how it is written back."""

from __future__ import annotations

import copy
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import tomli
from any_text import any_text
from hypothesis import given
from hypothesis import strategies as st
from recipe_texts import ACTIVATION, FULL, HEAD, INT8, WEIGHT

from qrecipe.errors.findings import RecipeError, RecipeReferenceError, UnknownNameError
from qrecipe.recipe.recipe import QConfigSpec, Recipe, load_recipe, parse_recipe
from qrecipe.recipe.references import builtin_names
from qrecipe.recipe.schema import TensorSpec
from qrecipe.recipe.toml.writer import toml_text

# --- what a recipe holds


def test_a_recipe_resolves_its_names():
    recipe = parse_recipe(
        FULL
        + '[rules.module_name]\n"conv1" = { qconfig = "int8", reason = "why", expect = 2 }\n'
        + '"fc" = { weight = "weight", optional = true }\n'
        + '[rules.module_type]\n"torch.nn.LSTM" = "float"\n'
    )
    assert recipe.phase == "ptq"
    by_key = {rule.key: rule for rule in recipe.rules}
    both = QConfigSpec(recipe.tensors["weight"], recipe.tensors["activation"])
    assert by_key["conv1"].qconfig == recipe.qconfigs["int8"] == both
    assert (by_key["conv1"].reason, by_key["conv1"].expect) == ("why", 2)
    assert by_key["fc"].qconfig == QConfigSpec(recipe.tensors["weight"], None)
    assert (by_key["fc"].label, by_key["fc"].optional) == ("weight=weight", True)
    assert by_key["torch.nn.LSTM"].qconfig is None
    assert (by_key[""].tier, by_key[""].label) == ("global", "float")


def test_a_recipe_is_a_value():
    text = FULL.replace('"minmax"', '{ name = "histogram", bins = 512 }')
    one, two = parse_recipe(text), parse_recipe(text)
    assert one == two
    assert hash(one) == hash(two)
    assert hash(one.qconfigs["int8"]) == hash(two.qconfigs["int8"])
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one
    assert one.qconfigs != parse_recipe(text.replace("512", "256")).qconfigs
    with pytest.raises(AttributeError):
        one.name = "other"  # type: ignore[misc]
    assert load_recipe(one) is one


def test_torch_spellings_of_dtypes_are_the_same_value():
    spelt = FULL.replace('"int8"\nq', '"qint8"\nq').replace('"uint8"', '"quint8"')
    assert spelt != FULL
    assert parse_recipe(spelt).tensors == parse_recipe(FULL).tensors


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("format", 1),
        ("rules.global", 3),
        ("tensor.weight.observer", 5),
        ("qconfig.int8.activation", 14),
        ('rules.module_name."layer1.0.*"', 16),
        ("rules.module_name.layer1.0.*", 16),
        ("rules.module_name.fc", 18),
    ],
)
def test_every_key_has_an_origin(key, line):
    text = (
        FULL + '[rules.module_name]\n"layer1.0.*" = "float"\n[rules.module_name.fc]\n'
        'qconfig = "float"\n'
    )
    origin = parse_recipe(text, "recipes/cnn.toml").origin(key)
    assert (origin.file, origin.line) == ("recipes/cnn.toml", line - (key.endswith("fc")))


@pytest.mark.parametrize("key", ["tensor.weihgt.observer", "phase", "", "= = =", "a\nb = 1"])
def test_what_no_file_sets_has_no_origin(key):
    with pytest.raises(UnknownNameError, match="no file sets"):
        parse_recipe(FULL).origin(key)


def test_what_a_recipe_holds_cannot_be_changed():
    lists = '[fx]\nroots = ["a"]\n[lint]\nignore = ["QR204"]\n'
    observer = '{ name = "histogram", bins = 512, edges = [1, 2] }'
    recipe = parse_recipe(FULL + lists)
    for held in (recipe.tensors, recipe.qconfigs):
        with pytest.raises(TypeError):
            held["other"] = None  # type: ignore[index]
        assert pickle.loads(pickle.dumps(held)) == copy.deepcopy(held) == held
        assert dict(held) == held
    assert (recipe.fx.roots, recipe.lint.ignore) == (("a",), ("QR204",))
    assert len({recipe, parse_recipe(FULL + lists), parse_recipe(FULL)}) == 2
    spec = TensorSpec.model_validate({"observer": tomli.loads(f"o = {observer}")["o"]})
    assert spec.observer is not None
    spec.observer.arguments["edges"].append(3)
    assert spec.observer.arguments == {"bins": 512, "edges": [1, 2]}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: parse_recipe(None), "parse_recipe takes a recipe as text"),
        (lambda: parse_recipe(FULL.encode()), 'not "bytes"'),
        (lambda: parse_recipe(Path("a.toml")), "load_recipe reads a file"),
        (lambda: parse_recipe(FULL, path=3), 'takes a path, not "int"'),
        (lambda: load_recipe(None), "load_recipe takes a path or a reference"),
        (lambda: load_recipe(3), 'not "int"'),
        (lambda: load_recipe(b"a.toml"), 'not "bytes"'),
        (lambda: parse_recipe(FULL).save(3), "save takes a path"),
        (lambda: parse_recipe(FULL).save("a\0b"), "null"),
    ],
)
def test_values_of_other_types_are_errors_that_say_what_is_accepted(call, says):
    with pytest.raises(RecipeReferenceError, match="QR001") as caught:
        call()
    assert says in str(caught.value)


# --- any junk at all

KEYS = st.sampled_from(
    [
        *("format", "name", "extends", "phase", "backend", "tensor", "qconfig", "rules", "lint"),
        *("global", "module_name", "function", "module_type", "weight", "activation", "observer"),
        *("dtype", "qscheme", "is_dynamic", "quant_min", "reason", "expect", "ignore", "recipe"),
        *("a", "", "layer1.0", "é\x1b"),
    ]
)
SCALARS = st.one_of(
    st.integers(-300, 300),
    st.booleans(),
    st.floats(),
    st.sampled_from(
        ["", "int8", "minmax", "float", "inherit", "x86", "weight", "./a.toml", "\x7f"]
    ),
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, JUNK, max_size=6))
def test_any_document_is_a_recipe_or_findings_in_our_own_words(document):
    text = "\n".join(
        f"{key} = {value}" for key, value in ((_key(k), _inline(v)) for k, v in document.items())
    )
    tomli.loads(text)
    message = ""
    try:
        parse_recipe(text, "some/junk.toml")
    except RecipeError as error:
        message = str(error) or "without a finding"
    assert not re.search(r"without a finding|pydantic|Input should|validat|Extra in", message)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", message)


def _key(key: str) -> str:
    escaped = "".join(c if c.isprintable() and c not in '"\\' else f"\\u{ord(c):04x}" for c in key)
    return f'"{escaped}"'


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {_inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, str):
        return _key(value)
    return str(value).lower()


# --- written back

NAMES = any_text(min_size=1, max_size=8).filter(lambda n: n not in ("float", "inherit")) | (
    st.sampled_from(["a.b", '"', "\\", "\n", "\x7f", "🎉", "x-1"])
).filter(str.strip)
PROSE = any_text(max_size=30) | st.sampled_from(
    ['"""', "a\nb", "\n", 'tail"', "\r\n", "a\\\n b", "#"]
)


AFFINE = {"qscheme": "per_tensor_affine"}


def described(draw: Any, rule: dict[str, Any]) -> dict[str, Any]:
    extra = {"reason": PROSE, "expect": st.integers(0, 9), "optional": st.booleans()}
    chosen = draw(st.sets(st.sampled_from(sorted(extra))))
    return {**rule, **{key: draw(extra[key]) for key in sorted(chosen)}}


@st.composite
def recipe_values(draw: Any) -> dict[str, Any]:
    tensors = {
        name: draw(
            st.sampled_from(
                [
                    {"observer": {"name": "minmax"}, "dtype": "int8", "eps": 1e-5} | AFFINE,
                    {"observer": {"name": "histogram", "bins": 512}, "dtype": "uint8"} | AFFINE,
                    {"observer": {"name": "minmax"}, "dtype": "uint8"}
                    | AFFINE
                    | {"is_dynamic": False},
                ]
            )
        )
        for name in draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    }
    names = st.sampled_from(sorted(tensors))
    qconfigs = {
        name: {"weight": draw(names), "activation": draw(names)}
        for name in draw(st.lists(NAMES, max_size=3, unique=True))
    }
    short = st.sampled_from([*sorted(qconfigs), "float"]).map(lambda name: {"qconfig": name})
    inline = st.builds(lambda w, a: {"weight": w, "activation": a}, names, names)
    patterns = st.sampled_from(["conv1", "layer*.{a,b}", "**.relu", ":add", "é", "layer1.0:add#1"])
    values: dict[str, Any] = {
        "format": 1,
        "backend": draw(st.sampled_from(["x86", "qnnpack"])),
        "tensor": tensors,
        "rules": {"global": described(draw, draw(short))},
    }
    if qconfigs:
        values["qconfig"] = qconfigs
    keys = draw(st.sets(patterns))
    if keys:
        rules = {key: described(draw, draw(short | inline)) for key in sorted(keys)}
        values["rules"]["module_name"] = rules
    if draw(st.booleans()):
        values |= {"name": draw(PROSE), "description": draw(PROSE)}
    if draw(st.booleans()):
        values["fx"] = {"roots": draw(st.lists(NAMES, max_size=3))}
        values["qat"] = {"epochs_fraction": draw(st.floats(1e-9, 1e9))}
    return values


@given(recipe_values())
def test_a_recipe_written_back_is_the_same_recipe(values):
    recipe = parse_recipe(toml_text(values))
    again = parse_recipe(recipe.to_toml())
    assert again.fingerprint == recipe.fingerprint
    assert again.to_toml() == recipe.to_toml()
    assert (again.tensors, again.qconfigs) == (recipe.tensors, recipe.qconfigs)
    assert (again.name, again.description) == (values.get("name"), values.get("description"))
    assert [(rule.key, rule.qconfig, rule.reason, rule.expect) for rule in again.rules] == [
        (rule.key, rule.qconfig, rule.reason, rule.expect) for rule in recipe.rules
    ]


@pytest.mark.parametrize("name", builtin_names())
def test_a_resolved_recipe_extends_nothing(name):
    recipe = load_recipe(f"builtin:{name}")
    assert "extends" not in tomli.loads(recipe.to_toml())
    assert parse_recipe(recipe.to_toml()).fingerprint == recipe.fingerprint


def test_the_fingerprint_is_of_the_meaning():
    same = [
        "# a comment\n" + FULL,
        FULL.replace(" = ", "="),
        FULL.replace("\n", "\r\n"),
        HEAD + INT8 + ACTIVATION + WEIGHT,
        FULL.replace('"minmax"', '{ name = "minmax" }').replace('"uint8"', '"quint8"'),
        FULL.replace('"float"', '{ qconfig = "float", reason = "later" }'),
        'description = "text"\n' + FULL,
    ]
    other = [
        'phase = "ptq"\n' + FULL,
        'name = "other"\n' + FULL,
        FULL.replace('"float"', '"int8"'),
        FULL.replace('"float"', '{ qconfig = "float", expect = 1 }'),
        FULL + "[calibration]\nmin_batches = 1\n",
    ]
    expected = parse_recipe(FULL).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", expected)
    assert {parse_recipe(text).fingerprint for text in same} == {expected}
    assert len({expected, *(parse_recipe(text).fingerprint for text in other)}) == len(other) + 1


def test_a_saved_recipe_loads_and_an_interrupted_one_leaves_the_old(tmp_path, monkeypatch):
    path = tmp_path / "saved.toml"
    recipe = parse_recipe(FULL)
    recipe.save(path)
    assert load_recipe(path).fingerprint == recipe.fingerprint
    before = path.read_bytes()

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(RecipeError, match="no space left"):
        parse_recipe(FULL.replace("x86", "qnnpack")).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["saved.toml"]


def test_saving_keeps_permissions_and_follows_a_link(tmp_path):
    target, link = tmp_path / "target.toml", tmp_path / "link.toml"
    target.write_text("")
    target.chmod(0o640)
    link.symlink_to(target)
    parse_recipe(FULL).save(link)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o640
    assert load_recipe(target).backend == "x86"


def test_a_recipe_that_cannot_be_saved_is_an_error_of_ours(tmp_path):
    with pytest.raises(RecipeError, match="cannot write"):
        parse_recipe(FULL).save(tmp_path / "none" / "saved.toml")


def test_a_loaded_recipe_says_how_to_refer_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cnn.toml").write_text(FULL)
    recipe: Recipe = load_recipe(Path("cnn.toml"))
    assert (recipe.path, recipe.reference) == ("cnn.toml", "cnn.toml")
    assert parse_recipe(FULL).path is None
    assert TensorSpec(dtype="int8") == TensorSpec.model_validate({"dtype": "qint8"})
