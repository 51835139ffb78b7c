"""What is refused: each mistake where it is, what it is and how to mend it."""

from __future__ import annotations

import re

import pytest
from recipe_texts import FULL, HEAD, findings_of, marked

from qrecipe.errors.findings import RecipeError, SchemaError
from qrecipe.recipe.recipe import parse_recipe

MINMAX = 'observer = "minmax"\nqscheme = "per_tensor_affine"\n'
FIXED = (
    'qscheme = "per_tensor_affine"\nobserver = { name = "fixed_qparams", scale = 0.1, zero_point = '
)


def test_a_finding_reads_as_the_documentation_shows_it():
    blank = "\n" * 9
    spec = 'dtype = "int8"\nqscheme = "per_tensor_symmetric"\n'
    text = f'{HEAD}{blank}[tensor.weight]\nobserver = "moving_avarage_minmax"\n{spec}'
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
    ("[tensor.a]\neps = 0", "QR102", "0", "must be at least 1.17549e-38"),
    ("[tensor.a]\neps = 1e300", "QR102", "1e300", "must be at most 1"),
    ("[tensor.a]\neps = nan", "QR102", "nan", "cannot be nan"),
    ("[tensor]\na = 3", "QR102", "3", "must be a table"),
    ("[tensor.a]\nobserver = 3", "QR102", "3", "a name, or a table with a name"),
    ("[tensor.a]\nobserver = { bins = 3 }", "QR103", "observer", 'needs a "name"'),
    *(
        (f'[tensor.a]\nobserver = "{name}"', "QR104", f'"{name}"', f'did you mean "{meant}"?')
        for name, meant in {
            "MinMaxObserver": "minmax",
            "torch.ao.quantization.MinMaxObserver": "minmax",
            "torch.ao.quantization.observer.HistogramObserver": "histogram",
            "PerChannelMinMaxObserver": "per_channel_minmax",
            "MovingAverageMinMaxObserver": "moving_average_minmax",
            "MovingAveragePerChannelMinMaxObserver": "moving_average_per_channel_minmax",
            "min_max": "minmax",
            "minmax_observer": "minmax",
        }.items()
    ),
    *(
        (f'[tensor.a]\nfake_quant = "{name}"', "QR104", f'"{name}"', f'did you mean "{meant}"?')
        for name, meant in {
            "FakeQuantize": "fake_quantize",
            "torch.ao.quantization.FusedMovingAvgObsFakeQuantize": "fused_moving_average",
            "FixedQParamsFakeQuantize": "fixed_qparams",
        }.items()
    ),
    ('[tensor.a]\nobserver = "FakeQuantize"', "QR104", '"FakeQuantize"', 'write fake_quant = "fak'),
    ('[tensor.a]\nfake_quant = "minmax"', "QR104", '"minmax"', 'write observer = "minmax"'),
    ("[[lint]]", "QR102", "lint", "must be a table"),
    ("[fx]\nroots = 'a'", "QR102", "'a'", "must be an array"),
    ("[fx]\nroots = ['a', 3]", "QR102", "3", "must be a string"),
    ("[calibration]\nmin_batches = 0", "QR102", "0", "at least 1"),
    ("[calibration]\nmin_batches = 101", "QR109", "101", "more than max_batches = 100"),
    ("[qat]\ndisable_observer_after = 1.5", "QR102", "1.5", "at most 1"),
    ("name = 2020-01-01", "QR102", "2020-01-01", "a date or time"),
    ('[lint]\nignore = ["QR204", "qr1"]', "QR102", '"qr1"', "codes of warnings"),
    ('[lint]\nignore = ["QR104"]', "QR102", '"QR104"', "the code of an error"),
    ('extends = { recipe = "./a.toml", sha256 = "12" }', "QR102", '"12"', "fingerprint"),
    ('extends = [{ recipee = "./a.toml" }]', "QR101", "recipee", 'mean "recipe"?'),
    ("[tensor.a]", "QR103", "a", "sets nothing"),
    ("[qconfig.a]", "QR103", "a", "sets nothing"),
    ('[tensor.a]\nobserver = "minmax"', "QR103", "a", 'needs "dtype"'),
    ('[tensor.a]\ndtype = "int8"', "QR103", "a", 'needs "observer"'),
    ('[tensor.a]\ndtype = "int8"\nobserver = "minmax"', "QR103", "a", '"per_tensor_symmetric"'),
    (
        '[tensor.a]\ndtype = "uint8"\nobserver = "per_channel_minmax"',
        "QR103",
        "a",
        'qscheme = "per_channel_affine"',
    ),
    (
        f'[tensor.a]\ndtype = "int8"\n{MINMAX}quant_min = 0',
        "QR103",
        "quant_min",
        'needs "quant_max"',
    ),
    (
        f'[tensor.a]\ndtype = "int8"\n{MINMAX}quant_max = 0',
        "QR103",
        "quant_max",
        'needs "quant_min"',
    ),
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
    ('[rules.module_name]\n"a[" = "float"', "QR110", '"a["', '"layer[12]"'),
    ('[rules.module_name]\n"**" = "float"', "QR110", '"**"', "rules.global"),
    ('[rules.module_type]\n"torch.nn.Linaer" = "float"', "QR108", '"torch.nn.Linaer"', "Linear"),
    ('[rules.module_type]\nLinear = "float"', "QR108", "Linear", '"torch.nn.Linear"'),
    (
        '[rules.function]\n"F.relu" = "float"',
        "QR108",
        '"F.relu"',
        'mean "torch.nn.functional.relu"?',
    ),
    ('[rules.module_type]\n"nn.Linear" = "float"', "QR108", '"nn.Linear"', '"torch.nn.Linear"?'),
    (
        '[tensor.a]\ndtype = "int8"\n'
        'observer = { name = "fixed_qparams", scale = 1e300, zero_point = 0 }',
        "QR106",
        "1e300",
        "at most 3.40282e+38",
    ),
    (
        '[rules.module_type]\n"F.linear" = "float"',
        "QR108",
        '"F.linear"',
        'it is a function: [rules.function] "torch.nn.functional.linear"',
    ),
    (
        '[rules.function]\n"nn.Conv2d" = "float"',
        "QR108",
        '"nn.Conv2d"',
        'it is a module type: [rules.module_type] "torch.nn.Conv2d"',
    ),
    (
        '[rules.function]\nLinear = "float"',
        "QR108",
        "Linear",
        'it is a module type: [rules.module_type] "torch.nn.Linear"',
    ),
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
    # keys that these short tensors lack, and base recipes that are not there, are other mistakes
    others = [f"{other.code} {other.message}" for other in findings if other.code != code]
    assert [other for other in others if not re.match("QR120|QR103 tensor.a needs", other)] == []


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
    (f"{MINMAX}quant_min = 5\nquant_max = 5", "5", "not less than"),
    (f"{MINMAX}quant_min = -129\nquant_max = 5", "-129", "below the range of int8"),
    (f"{MINMAX}quant_min = 0\nquant_max = 128", "128", "above the range of int8"),
    (f"{MINMAX}quant_min = 10\nquant_max = 127", "10", "does not contain 0"),
    (f"{MINMAX}quant_min = -9\nquant_max = -1", "-1", "does not contain 0"),
    (
        f"{MINMAX}quant_min = 0\nquant_max = 9\nreduce_range = true",
        "reduce_range",
        "would halve",
    ),
    (f"{FIXED}128 }}", "128", "outside the range -128 to 127"),
    (f"{FIXED}9223372036854775807 }}", "9223372036854775807", "outside the range"),
    (f"{FIXED}64 }}\nreduce_range = true", "64", "outside the range -64 to 63"),
    (f"{FIXED}-3 }}\nquant_min = 0\nquant_max = 9", "-3", "outside the range 0 to 9"),
    (f'{MINMAX}fake_quant = "fused_moving_average"', '"fused_moving_average"', "cannot wrap"),
    (
        'observer = "moving_average_minmax"\nqscheme = "per_tensor_symmetric"\ndtype = "int4"\n'
        'fake_quant = "fused_moving_average"',
        '"fused_moving_average"',
        "too large for symmetric int4",
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
    dtype = "" if "dtype" in keys else 'dtype = "int8"\n'
    (finding,) = findings_of(f"{FULL}[tensor.a]\n{dtype}{keys}\n")
    assert (finding.code, marked(finding)) == ("QR109", under_caret)
    assert says in finding.message


@pytest.mark.parametrize(
    "keys",
    [
        f'dtype = "int8"\n{MINMAX}quant_min = -127\nquant_max = 127\neps = 0.000244',
        f'dtype = "int4"\n{MINMAX}quant_min = -8\nquant_max = 7',
        f'dtype = "uint8"\n{MINMAX}quant_min = 0\nquant_max = 127',
        f'dtype = "int8"\n{FIXED}-128 }}',
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
        f'[tensor.reduced]\n{MINMAX}dtype = "int8"\nreduce_range = true\n'
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


def test_a_warning_of_another_version_may_be_ignored():
    recipe = parse_recipe(FULL + '[lint]\nignore = ["QR214", "QR204"]\n')
    assert recipe.lint.ignore == ("QR214", "QR204")


def test_all_codes_that_cannot_be_ignored_are_told_at_once():
    findings = findings_of(FULL + '[lint]\nignore = ["QR301", "x", "QR214", "QR104"]\n')
    assert [marked(finding) for finding in findings] == ['"QR301"', '"x"', '"QR104"']


ODD_NAMES = [
    '[rules.module_name]\na = "{}"',
    '[qconfig.a]\nweight = "{}"',
    '[tensor.a]\nobserver = "{}"',
    '[tensor.a]\nobserver = {{ name = "{}", bins = 3 }}',
    '[tensor.a]\nobserver = {{ name = "histogram", "{}" = 3 }}',
    '[tensor.a]\nobserver = {{ name = "histogram", bins = "{}" }}',
    '[rules.module_type]\n"{}" = "float"',
    '[rules.function]\n"{}" = "float"',
    '[rules.module_name]\n"[{}" = "float"',
    '[rules.module_name]\n"{}" = {{ weight = "weight", qconfg = "int8" }}',
    '["{}"]\na = 3',
    '[lint]\nignore = ["{}"]',
]


@pytest.mark.parametrize("text", ODD_NAMES)
def test_names_of_a_recipe_cannot_forge_findings_or_flood_the_screen(text):
    forged = "x\\nother.toml:1:1: QR104 forged\\u2028\\u001b[2J"
    for name in (forged, "long" * 75_000):
        with pytest.raises(RecipeError) as caught:
            parse_recipe(FULL + text.format(name) + "\n")
        for finding in caught.value.findings:
            said = f"{finding.message} {finding.hint}"
            assert not re.search("[\n\x1b\u2028]", said)
            assert len(said) < 2_000


def test_names_of_the_author_that_are_near_are_shown_escaped():
    text = '[qconfig."q\\nforged"]\nweight = "weight"\n[rules.module_name]\na = "q\\nforge"\n'
    (finding,) = findings_of(FULL + text)
    assert finding.hint.startswith('did you mean "q\\nforged"? one of "int8"')


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
    assert finding.message == "format 2 needs qrecipe 2.0 or newer"
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
