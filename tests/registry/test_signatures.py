"""The committed tables hold for the installed torch, and arguments are checked without it."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import operator
import runpy
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from places import ROOT

from qrecipe._torch_versions import TESTED_TORCH
from qrecipe.observers.registration import own_parameters
from qrecipe.registry.arguments import SPEC_ARGUMENTS
from qrecipe.registry.builtin import (
    FAKE_QUANTS,
    OBSERVERS,
    canonical_module_type,
    check_arguments,
    function_families,
    function_family,
    is_module_type,
    module_types,
)

COMMITTED = json.loads(
    (ROOT / "qrecipe" / "registry" / "torch_names.json").read_text(encoding="utf-8")
)
VERSION = ".".join(torch.__version__.split(".")[:2])
SIGNATURES = {**OBSERVERS, **{f"{name} ": found for name, found in FAKE_QUANTS.items()}}

# Deprecated, of no use in a recipe, or what the tensor spec and the operation decide.
WITHHELD = {"compute_dtype", "custom_op_name", "channel_len", "scale", "zero_point"}


def torch_class(target: str) -> type:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", SIGNATURES)
def test_committed_signature_is_that_of_the_installed_torch(name):
    signature = SIGNATURES[name]
    taken = {parameter for parameter, _ in own_parameters(torch_class(signature.target))}
    assert set(signature.parameters) <= taken
    assert taken - set(signature.parameters) <= WITHHELD


def test_spec_arguments_are_arguments_of_torchs_observers():
    taken = inspect.signature(torch.ao.quantization.PerChannelMinMaxObserver).parameters
    assert set(taken) - {"kwargs"} == SPEC_ARGUMENTS


def test_committed_names_are_those_of_the_installed_torch():
    tool = runpy.run_path(str(ROOT / "tools" / "torch_names.py"))
    assert tool["merged"](COMMITTED, VERSION, tool["torch_names"]()) == COMMITTED


def test_committed_names_are_of_the_tested_versions_and_none_is_lacking_everywhere():
    assert set(COMMITTED["lacking"]) == set(TESTED_TORCH)
    assert not set.intersection(*map(set, COMMITTED["lacking"].values()))


def test_names_of_one_more_torch_are_entered_and_the_others_lack_what_is_new():
    tool = runpy.run_path(str(ROOT / "tools" / "torch_names.py"))
    first = {"module_types": {"torch.nn.A": "a.A"}, "functions": {"torch": ["f"]}, "families": {}}
    second = {"module_types": {}, "functions": {"torch": ["f", "g"]}, "families": {"g": "f"}}
    table = tool["merged"]({**first, "lacking": {}}, "2.1", first)
    table = tool["merged"](table, "2.2", second)
    assert table == {
        "module_types": first["module_types"],
        "functions": second["functions"],
        "families": second["families"],
        "lacking": {"2.1": ["torch.g"], "2.2": ["torch.nn.A"]},
    }


def test_signatures_are_read_without_torch():
    code = (
        "import sys; from qrecipe.registry.builtin import function_family, module_types;"
        "assert function_family('torch.add') == 'add' and 'torch.nn.Conv2d' in module_types();"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def problems_of(kind, name, **arguments):
    return [(p.code, p.argument) for p in check_arguments(kind, name, arguments)]


def test_every_problem_of_a_constructor_is_found_at_once():
    found = problems_of("observer", "fixed_qparams", scale="wide", zero=1, dtype="int8")
    assert found == [
        ("QR106", "scale"),
        ("QR105", "zero"),
        ("QR105", "dtype"),
        ("QR106", "zero_point"),
    ]


def test_misspelt_names_are_answered_with_the_nearest():
    (unknown,) = check_arguments("observer", "moving_avarage_minmax", {})
    assert (unknown.code, unknown.hint) == ("QR104", 'did you mean "moving_average_minmax"?')
    (argument,) = check_arguments("observer", "histogram", {"binz": 64})
    assert (argument.code, argument.hint) == ("QR105", 'did you mean "bins"?')


def test_spec_key_among_the_arguments_is_sent_to_its_place():
    (problem,) = check_arguments("observer", "minmax", {"reduce_range": True})
    assert problem.hint == 'write "reduce_range" as a key of the tensor, next to "observer"'
    (axis,) = check_arguments("observer", "per_channel_minmax", {"ch_axis": 1})
    assert "comes from the operation" in axis.hint


@pytest.mark.parametrize("bins", [0, -1, 15, 2**14 + 1, 10**30, 2048.0, True, "2048", None])
def test_senseless_bins_are_refused(bins):
    assert problems_of("observer", "histogram", bins=bins) == [("QR106", "bins")]


@given(st.floats() | st.integers())
def test_averaging_constant_lies_between_zero_and_one(value):
    refused = problems_of("observer", "moving_average_minmax", averaging_constant=value)
    sound = 0 < value <= 1 and not math.isnan(value)
    assert refused == ([] if sound else [("QR106", "averaging_constant")])


@pytest.mark.parametrize(
    ("spelling", "family"),
    [
        ("torch.add", "add"),
        ("operator.add", "add"),
        ("operator.iadd", "add"),
        ("Tensor.add", "add"),
        ("torch.Tensor.add_", "add"),
        ("add", "add"),
        ("torch.nn.functional.relu", "relu"),
        ("torch.nn.functional.relu_", "relu"),
        ("torch.nn.functional.hardswish", "hardswish"),
        ("operator.itruediv", "div"),
        ("torch.true_divide", "div"),
        ("torch.concat", "cat"),
        ("operator.and_", "bitwise_and"),
        ("operator.getitem", "getitem"),
        ("F.relu", None),
        ("operator.relu", None),
        ("torch.ad", None),
        ("torch.load", None),
        ("torch.nn.functional.boolean_dispatch", None),
        ("", None),
    ],
)
def test_spellings_of_a_function_share_its_family(spelling, family):
    assert function_family(spelling) == family


def test_every_family_is_its_own_family():
    assert {name: function_family(name) for name in function_families()} == {
        name: name for name in function_families()
    }


@pytest.mark.parametrize("merged", [("operator.truediv", 3.0), ("operator.floordiv", 2.0)])
def test_operators_are_merged_with_the_function_that_computes_the_same(merged):
    spelling, other = merged
    x = torch.tensor([-7.0, 5.0, 0.5])
    by_operator = getattr(operator, spelling.rpartition(".")[2])(x, other)
    assert torch.equal(by_operator, getattr(torch, function_family(spelling))(x, other))


def test_module_types_are_known_by_public_and_internal_name():
    assert is_module_type("torch.nn.Conv2d")
    assert is_module_type("torch.nn.modules.conv.Conv2d")
    assert canonical_module_type("torch.nn.Conv2d") == "torch.nn.modules.conv.Conv2d"
    assert canonical_module_type("mypkg.Attention") == "mypkg.Attention"
    assert not is_module_type("torch.nn.Conv9d")
    installed = set(module_types()) - set(COMMITTED["lacking"][VERSION])
    assert all(torch_class(canonical_module_type(name)) is torch_class(name) for name in installed)
