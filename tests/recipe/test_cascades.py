"""One mistake is one finding: what only follows from it is not reported, what does not is."""

from __future__ import annotations

import pytest
from recipe_files import BASE, findings_of, write
from recipe_texts import FULL
from recipe_texts import findings_of as findings_of_text

SPEC = 'dtype = "int8"\nqscheme = "per_tensor_affine"\n'
HISTOGRAM = f'{SPEC}observer = "histogram"\n'
FIXED = f'{SPEC}observer = {{ name = "fixed_qparams", '
SINGLE = [
    # text after a sound recipe, the only code that it gives
    ('[qconfig.e]\n[rules.module_name]\na = "e"', "QR103"),
    ('[tensor.e]\n[qconfig.e]\nweight = "e"\n[rules.module_name]\na = "e"', "QR103"),
    ('[tensor]\ne = 3\n[qconfig.e]\nweight = "e"', "QR102"),
    (f"[tensor.a]\n{HISTOGRAM}quant_min = 1.0\nquant_max = 127", "QR102"),
    (f"[tensor.a]\n{HISTOGRAM}quant_mim = 0\nquant_max = 127", "QR101"),
    (f"[tensor.a]\n{FIXED}scale = nan, zero_point = 0 }}", "QR102"),
    (f"[tensor.a]\n{FIXED}scal = 0.1, zero_point = 0 }}", "QR105"),
    (f"[tensor.a]\n{SPEC}observer = {{ name = 3 }}", "QR102"),
    (f"[tensor.a]\n{SPEC}observer = {{ name = nan }}", "QR102"),
    (f"[tensor.a]\n{SPEC}observr = 'minmax'", "QR101"),
    ('[tensor.a]\nobserver = "minmax"\ndtpe = "int8"', "QR101"),
    ('[tensor.a]\nobserver = "minmax"\ndtype = "int8"\nqscheme = "affine"', "QR102"),
    ('[tensor.a]\nis_dynamic = "yes"\ndtype = "int8"\nobserver = "placeholder"', "QR102"),
    ('[tensor.a]\nis_dynamik = true\ndtype = "int8"', "QR101"),
    (
        '[tensor.a]\ndtype = "fp16"\nis_dynamic = true\n'
        '[tensor.b]\ndtype = "float16"\n'
        '[qconfig.e]\nweight = "b"\nactivation = "a"',
        "QR102",
    ),
    ('[tensor.a]\ndtype = "fp16"\nis_dynamic = true\n[qconfig.e]\nweight = "a"', "QR102"),
    (
        '[tensor.a]\ndtype = "int8"\nobserver = "minmax"\nqscheme = "per_channel_symmetric"\n'
        '[qconfig.e]\nweight = "weight"\nactivation = "a"',
        "QR109",
    ),
    (
        '[tensor.a]\ndtype = "float16"\nqscheme = "per_channel_symmetric"\n'
        '[qconfig.e]\nactivation = "a"',
        "QR109",
    ),
    ('[tensor.a]\ndtype = "float16"\nquant_min = 0', "QR109"),
    ("[calibration]\nmin_batches = 200\nmax_batches = 0", "QR102"),
    ('[rules.module_name]\na = { qconfg = "int8" }', "QR101"),
    ('[qconfg.e]\nweight = "weight"\n[rules.module_name]\na = "e"', "QR101"),
    ('[rules.module_names]\na = "float"', "QR101"),
]


@pytest.mark.parametrize(("text", "code"), SINGLE)
def test_what_follows_from_a_mistake_is_not_reported(text, code):
    assert [finding.code for finding in findings_of_text(f"{FULL}{text}\n")] == [code]


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("format = 1", "formt = 1", "QR101"),
        ('backend = "x86"', 'backnd = "x86"', "QR101"),
        ("rules.global", "rules.globl", "QR101"),
        ('rules.global = "float"', 'rules = "float"', "QR102"),
        ('rules.global = "float"', "", "QR102"),
        ("format = 1\n", 'extend = "builtin:x86-static"\n', "QR101"),
        ("format = 1\n", 'extends = { recipee = "builtin:x86-static" }\n', "QR101"),
    ],
)
def test_what_is_misspelt_or_amiss_is_not_missing_as_well(old, new, code):
    text = FULL.replace(old, new) + ("" if new else '[[rules]]\nglobal = "float"\n')
    assert text != FULL
    assert [finding.code for finding in findings_of_text(text)] == [code]


def test_mistakes_that_have_nothing_to_do_with_each_other_are_all_reported():
    text = FULL.replace('backend = "x86"\n', "")
    text += f'[tensor.a]\n{FIXED}scale = "wide", zero = 1 }}\neps = 2\n'
    text += '[tensor.b]\ndtype = "int8"\neps = nan\n'
    assert [finding.code for finding in findings_of_text(text)] == [
        "QR103",  # no backend
        "QR106",  # scale
        "QR106",  # no zero_point
        "QR105",
        "QR102",
        "QR103",  # no observer
        "QR103",  # no qscheme
        "QR102",
    ]


def test_every_base_is_looked_at_though_another_is_no_reference(tmp_path, monkeypatch):
    mistakes = '{ recipe = "builtin:x86-statik" }, 3, { recip = "x" }, { recipe = 3 }'
    pinned = '{ recipe = "./base.toml", sha256 = "12" }'
    top = f'extends = ["./none.toml", {mistakes}, {pinned}, ""]\n'
    write(tmp_path, base=BASE.replace('"minmax"', '"minmaxx"'), top=top)
    found = findings_of(tmp_path, "top", monkeypatch)
    in_top = [finding for finding in found if finding.location.file == "top.toml"]
    assert [finding.code for finding in in_top] == [
        "QR120",
        "QR120",
        "QR102",
        "QR101",
        "QR102",
        "QR102",
        "QR120",
    ]
    assert [finding.code for finding in found[len(in_top) :]] == ["QR104"]


def test_a_value_that_is_amiss_still_settles_a_conflict(tmp_path, monkeypatch):
    write(
        tmp_path,
        one=BASE + '"fc" = "float"\n',
        two=BASE + '"fc" = "int8"\n',
        top='extends = ["./one.toml", "./two.toml"]\n[rules.module_name]\n"fc" = 3\n',
    )
    (finding,) = findings_of(tmp_path, "top", monkeypatch)
    assert (finding.code, finding.location.file) == ("QR102", "top.toml")


def test_a_rule_that_is_amiss_below_can_be_inherited(tmp_path, monkeypatch):
    write(
        tmp_path,
        base=BASE + '"fc" = 3\n',
        top='extends = "./base.toml"\n[rules.module_name]\n"fc" = "inherit"\n',
    )
    (finding,) = findings_of(tmp_path, "top", monkeypatch)
    assert (finding.code, finding.location.file) == ("QR102", "base.toml")
