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
from hypothesis import given, settings
from hypothesis import strategies as st

from qrecipe.errors import RecipeError, SchemaError, UnknownNameError
from qrecipe.recipe import QConfigSpec, Recipe, load_recipe, parse_recipe
from qrecipe.references import builtin_names
from qrecipe.schema import TensorSpec
from qrecipe.writing import toml_text

HEAD = """\
format = 1
backend = "x86"
rules.global = "float"
"""
WEIGHT = """\
[tensor.weight]
observer = "per_channel_minmax"
dtype = "int8"
qscheme = "per_channel_symmetric"
"""
ACTIVATION = """\
[tensor.activation]
observer = "minmax"
dtype = "uint8"
"""
INT8 = '[qconfig.int8]\nweight = "weight"\nactivation = "activation"\n'
FULL = HEAD + WEIGHT + ACTIVATION + INT8


def findings_of(text: str):
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "recipes/cnn.toml")
    return caught.value.findings


def marked(finding) -> str:
    """The text under the caret."""
    return finding.location.source[finding.location.column - 1 : finding.location.end_column - 1]


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
        ("qconfig.int8.activation", 13),
        ('rules.module_name."layer1.0.*"', 15),
        ("rules.module_name.layer1.0.*", 15),
        ("rules.module_name.fc", 17),
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


# --- what is refused


def test_a_finding_reads_as_the_documentation_shows_it():
    blank = "\n" * 9
    text = f'{HEAD}{blank}[tensor.weight]\nobserver = "moving_avarage_minmax"\ndtype = "int8"\n'
    (finding,) = findings_of(text)
    assert str(finding) == (
        'recipes/cnn.toml:14:12: QR104 unknown observer "moving_avarage_minmax"\n'
        '   14 | observer = "moving_avarage_minmax"\n'
        '      |            ^^^^^^^^^^^^^^^^^^^^^^^ did you mean "moving_average_minmax"?'
    )


MISTAKES = [
    # text after a sound recipe, code, text under the caret, part of message or hint
    ('[tensor.a]\ndtyp = "int8"', "QR101", "dtyp", 'did you mean "dtype"?'),
    ("[rules.module_names]", "QR101", "module_names", 'did you mean "module_name"?'),
    ("[tensors]", "QR101", "tensors", 'did you mean "tensor"?'),
    ('[rules.module_name]\nlayer1.0.conv = "float"', "QR101", "0", '"layer1.0.conv"'),
    ('[tensor.a]\nobserver = "minmax"\ndtype = "int9"', "QR102", '"int9"', 'mean "int8"?'),
    ('phase = "qta"', "QR102", '"qta"', 'did you mean "qat"?'),
    ("[qat]\nschedule = 3", "QR102", "3", '"cosine"'),
    ('[tensor.a]\nquant_min = "0"', "QR102", '"0"', "must be an integer"),
    ("[tensor.a]\nquant_min = 0.5", "QR102", "0.5", "must be an integer"),
    ("[tensor.a]\nreduce_range = 1", "QR102", "1", "must be true or false"),
    ("[tensor.a]\neps = 0", "QR102", "0", "must be greater than 0"),
    ("[tensor.a]\neps = nan", "QR102", "nan", "cannot be nan"),
    ("[tensor]\na = 3", "QR102", "3", "must be a table"),
    ("[tensor.a]\nobserver = 3", "QR102", "3", "a name, or a table with a name"),
    ("[tensor.a]\nobserver = { bins = 3 }", "QR103", "observer", 'needs a "name"'),
    ("[[lint]]", "QR102", "lint", "must be a table"),
    ("[fx]\nroots = 'a'", "QR102", "'a'", "must be an array"),
    ("[fx]\nroots = ['a', 3]", "QR102", "3", "must be a string"),
    ("[calibration]\nmin_batches = 0", "QR102", "0", "at least 1"),
    ("[calibration]\nmin_batches = 101", "QR109", "101", "more than max_batches = 100"),
    ("[qat]\ndisable_observer_after = 1.5", "QR102", "1.5", "at most 1"),
    ("name = 2020-01-01", "QR102", "2020-01-01", "a date or time"),
    ('[lint]\nignore = ["QR204", "qr1"]', "QR102", '"qr1"', "codes of warnings"),
    ('[lint]\nignore = ["QR104"]', "QR102", '"QR104"', "is an error"),
    ('extends = { recipe = "./a.toml", sha256 = "12" }', "QR102", '"12"', "fingerprint"),
    ('extends = [{ recipee = "./a.toml" }]', "QR101", "recipee", 'mean "recipe"?'),
    ("[tensor.a]", "QR103", "a", "sets nothing"),
    ("[qconfig.a]", "QR103", "a", "sets nothing"),
    ('[tensor.a]\nobserver = "minmax"', "QR103", "a", "needs a dtype"),
    ('[tensor.a]\ndtype = "int8"', "QR103", "a", "needs an observer"),
    (
        '[tensor.a]\ndtype = "int8"\nobserver = { name = "histogram", bin = 9 }',
        "QR105",
        "bin",
        'mean "bins"?',
    ),
    (
        '[tensor.a]\ndtype = "int8"\nobserver = { name = "histogram", bins = "9" }',
        "QR106",
        '"9"',
        "an integer",
    ),
    (
        '[tensor.a]\ndtype = "int8"\nobserver = "minmax"\nfake_quant = "fake_quantise"',
        "QR104",
        '"fake_quantise"',
        'mean "fake_quantize"?',
    ),
    (
        '[tensor.a]\ndtype = "int8"\nobserver = "minmax"\nfake_quant = "fused_moving_average"',
        "QR109",
        '"fused_moving_average"',
        "cannot wrap",
    ),
    ('[qconfig.a]\nweight = "wieght"', "QR107", '"wieght"', 'mean "weight"?'),
    ('[rules.module_name]\n"a" = "int9"', "QR107", '"int9"', 'mean "int8"?'),
    ('[rules.module_name]\n"a" = { qconfig = "int9" }', "QR107", '"int9"', 'mean "int8"?'),
    ('[rules.module_name]\n"a" = { weight = "w" }', "QR107", '"w"', "no tensor"),
    ('[qconfig.float]\nweight = "weight"', "QR109", "float", "reserved"),
    ('[qconfig.inherit]\nweight = "weight"', "QR109", "inherit", "reserved"),
    (
        '[rules.module_name]\na = { qconfig = "int8", weight = "weight" }',
        "QR109",
        "weight",
        "not both",
    ),
    ("[rules.module_name]\na = {}", "QR103", "a", "does not say what to do"),
    ('[rules.module_name]\na = { reason = "none" }', "QR103", "a", "does not say what to do"),
    ("[rules.module_name]\na = 3", "QR102", "3", "the name of a qconfig, or a table"),
    ('[rules.module_name]\na = { qconfig = "int8", expect = -1 }', "QR102", "-1", "at least 0"),
    ('[rules.module_name]\n"a[" = "float"', "QR110", '"a["', "unbalanced"),
    ('[rules.module_name]\n"**" = "float"', "QR110", '"**"', "rules.global"),
    ('[rules.module_type]\n"torch.nn.Linaer" = "float"', "QR108", '"torch.nn.Linaer"', "Linear"),
    ('[rules.module_type]\nLinear = "float"', "QR108", "Linear", '"torch.nn.Linear"'),
    ('[rules.function]\n"torch.matmull" = "float"', "QR108", '"torch.matmull"', "matmul"),
    ('[rules.function]\n"operator.ad" = "float"', "QR108", '"operator.ad"', '"operator.add"'),
    ('[rules.function]\n"Tensor.matmull" = "float"', "QR108", '"Tensor.matmull"', "matmul"),
]


@pytest.mark.parametrize(("text", "code", "under_caret", "says"), MISTAKES)
def test_a_mistake_is_shown_where_it_is_and_how_to_mend_it(text, code, under_caret, says):
    is_top_level = not text.startswith("[")
    findings = findings_of(f"{text}\n{FULL}" if is_top_level else f"{FULL}{text}\n")
    finding = next(finding for finding in findings if finding.code == code)
    assert (marked(finding), says in f"{finding.message} {finding.hint}") == (under_caret, True)
    others = {other.code for other in findings} - {code}
    assert others <= {"QR120", "QR103"}, "one mistake is one finding, or what follows from it"


CONTRADICTIONS = [
    # keys of a tensor, text under the caret, part of the message
    ('observer = "minmax"\nqscheme = "per_channel_affine"', '"per_channel_affine"', "per tensor"),
    (
        'observer = "per_channel_minmax"\nqscheme = "per_tensor_affine"',
        '"per_tensor_affine"',
        "per channel",
    ),
    (
        'observer = "per_channel_minmax"\nqscheme = "per_channel_affine_float_qparams"',
        '"per_channel_affine_float_qparams"',
        "for uint8 and uint4",
    ),
    ('observer = "placeholder"', '"placeholder"', "observes nothing"),
    ('observer = "minmax"\nquant_min = 0', "quant_min", 'needs a "quant_max"'),
    ('observer = "minmax"\nquant_max = 0', "quant_max", 'needs a "quant_min"'),
    ('observer = "minmax"\nquant_min = 5\nquant_max = 5', "5", "not less than"),
    ('observer = "minmax"\nquant_min = -129\nquant_max = 5', "-129", "less than int8"),
    ('observer = "minmax"\nquant_min = 0\nquant_max = 128', "128", "more than int8"),
    (
        'observer = "minmax"\nquant_min = 0\nquant_max = 9\nreduce_range = true',
        "reduce_range",
        "would halve",
    ),
    ('is_dynamic = true\nobserver = "minmax"', "observer", 'takes no "observer"'),
    ("is_dynamic = true\neps = 0.1", "eps", 'takes no "eps"'),
    ("is_dynamic = true\nreduce_range = false", "reduce_range", 'takes no "reduce_range"'),
    (
        'is_dynamic = true\nqscheme = "per_tensor_symmetric"',
        '"per_tensor_symmetric"',
        'cannot be "per_tensor_symmetric"',
    ),
]


@pytest.mark.parametrize(("keys", "under_caret", "says"), CONTRADICTIONS)
def test_settings_of_a_tensor_that_contradict_each_other_are_refused(keys, under_caret, says):
    (finding,) = findings_of(f'{FULL}[tensor.a]\ndtype = "int8"\n{keys}\n')
    assert (finding.code, marked(finding)) == ("QR109", under_caret)
    assert says in finding.message


@pytest.mark.parametrize(
    "keys",
    [
        'dtype = "int8"\nobserver = "minmax"\nquant_min = -127\nquant_max = 127\neps = 0.000244',
        'dtype = "int4"\nobserver = "minmax"\nquant_min = -8\nquant_max = 7',
        'dtype = "uint8"\nis_dynamic = true\nqscheme = "per_tensor_affine"',
        'dtype = "float16"\nis_dynamic = true',
        'dtype = "float16"',
        'dtype = "float32"\nobserver = "placeholder"',
        'dtype = "uint4"\nobserver = "per_channel_minmax"\n'
        'qscheme = "per_channel_affine_float_qparams"',
    ],
)
def test_what_a_tensor_may_be(keys):
    assert "a" in parse_recipe(f"{FULL}[tensor.a]\n{keys}\n").tensors


@pytest.mark.parametrize("keys", ["quant_min = 0\nquant_max = 1", "eps = 0.1", 'observer="minmax"'])
def test_a_float_tensor_takes_no_scale(keys):
    (finding,) = findings_of(f'{FULL}[tensor.a]\ndtype = "float16"\n{keys}\n')[:1]
    assert finding.code == "QR109"


def test_a_tensor_is_refused_where_its_use_forbids_it_and_the_cause_is_shown():
    text = FULL + (
        '[tensor.reduced]\nobserver = "minmax"\ndtype = "int8"\nreduce_range = true\n'
        '[tensor.dynamic]\ndtype = "uint8"\nis_dynamic = true\n'
        '[tensor.half]\ndtype = "float16"\nis_dynamic = true\n'
        '[qconfig.a]\nweight = "reduced"\nactivation = "weight"\n'
        '[qconfig.b]\nweight = "dynamic"\nactivation = "half"\n'
        '[rules.module_name]\nx = { weight = "half", activation = "dynamic" }\n'
        'y = { weight = "half", activation = "half" }\n'
    )
    shown = [
        (marked(finding), [place.source for _, place in finding.related])
        for finding in findings_of(text)
    ]
    assert shown == [
        ('"reduced"', ["reduce_range = true"]),
        ('"weight"', ['qscheme = "per_channel_symmetric"']),
        ('"dynamic"', ["is_dynamic = true"]),
        ('"dynamic"', []),
        ('"half"', []),
    ]


def test_all_findings_come_at_once():
    texts = [text for text, *_ in MISTAKES if text.startswith("[tensor.a]\n")]
    numbered = "\n".join(text.replace(".a]", f".a{i}]") for i, text in enumerate(texts))
    assert {finding.code for finding in findings_of(FULL + numbered)} >= {
        "QR101",
        "QR102",
        "QR103",
        "QR104",
        "QR105",
        "QR106",
        "QR109",
    }


def test_several_kinds_of_findings_raise_their_nearest_common_class():
    with pytest.raises(RecipeError) as caught:
        parse_recipe(FULL + '[qat]\nschedule = 1\n[rules.module_name]\na = "int9"\n')
    assert type(caught.value) is RecipeError
    with pytest.raises(SchemaError):
        parse_recipe(FULL + "[qat]\nschedule = 1\n")


def test_a_newer_format_is_one_finding_that_names_the_version():
    (finding,) = findings_of(FULL.replace("format = 1", "format = 2") + "[new]\nkey = 1\n")
    assert (finding.code, marked(finding)) == ("QR111", "2")
    assert "reads format 1" in finding.hint
    assert findings_of(FULL.replace("format = 1", "format = 0"))[0].code == "QR102"


def test_names_of_the_author_and_of_other_packages_are_taken():
    text = FULL + (
        '[rules.module_type]\n"mypkg.layers.Attention" = "float"\n"__main__.Net" = "float"\n'
        '"torch.nn.modules.conv.Conv2d" = "float"\n'
        '[rules.function]\n"torchvision.ops.nms" = "float"\nadd = "float"\n'
        '"Tensor.add_" = "float"\n"operator.iadd" = "float"\n"torch.nn.functional.relu" = "float"\n'
    )
    assert len(parse_recipe(text).rules) == 9


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
@settings(max_examples=200, deadline=None)
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

NAMES = st.text(min_size=1, max_size=8).filter(lambda n: n not in ("float", "inherit")) | (
    st.sampled_from(["a.b", '"', "\\", "\n", "\x7f", "🎉", "x-1"])
).filter(str.strip)
PROSE = st.text(max_size=30) | st.sampled_from(
    ['"""', "a\nb", "\n", 'tail"', "\r\n", "a\\\n b", "#"]
)


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
                    {"observer": {"name": "minmax"}, "dtype": "int8", "eps": 1e-5},
                    {"observer": {"name": "histogram", "bins": 512}, "dtype": "uint8"},
                    {"observer": {"name": "minmax"}, "dtype": "uint8", "is_dynamic": False},
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
@settings(max_examples=100, deadline=None)
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
