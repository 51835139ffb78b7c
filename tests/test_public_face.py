"""What holds for every public name, and for every value that public functions return."""

from __future__ import annotations

import copy
import inspect
import io
import sys
import typing
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from types import FunctionType, SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from runs import hurry
from torch import nn

import qrecipe
from qrecipe.registry import table as registered

MARK = "<script>alert(1)<|script>"  # no "/", which some names may not have
ESCAPED = "&lt;script&gt;alert(1)&lt;|script&gt;"

RECIPE = f"""
format = 1
name = "{MARK}"
extends = "builtin:x86-static"
[lint]
ignore = ["QR201", "QR203", "QR208", "QR218", "QR219"]
[rules.module_name]
"last{MARK}" = {{ qconfig = "float", reason = "{MARK}" }}
"""

PUBLIC = {name: getattr(qrecipe, name) for name in qrecipe.__all__ if name != "__version__"}
CLASSES = {name: value for name, value in PUBLIC.items() if isinstance(value, type)}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if isinstance(value, FunctionType)}


def own(cls):
    """What a class of ours defines under public names, what it inherits from us included."""
    classes = [base for base in cls.__mro__ if base.__module__.startswith("qrecipe.")]
    return {
        name: value
        for base in reversed(classes)
        for name, value in vars(base).items()
        if not name.startswith("_")
    }


CALLABLES = FUNCTIONS | {
    f"{name}.{attribute}": value
    for name, cls in CLASSES.items()
    for attribute, value in own(cls).items()
    if isinstance(value, FunctionType)
}


def test_dir_is_what_is_public():
    assert dir(qrecipe) == sorted(qrecipe.__all__)


@pytest.mark.parametrize("parameter", ["forward", "progress"])
def test_callbacks_are_passed_by_keyword(parameter):
    taking = {
        name: inspect.signature(function).parameters[parameter].kind
        for name, function in CALLABLES.items()
        if parameter in inspect.signature(function).parameters
    }
    assert len(taking) >= 6
    assert set(taking.values()) == {inspect.Parameter.KEYWORD_ONLY}, taking


def test_whatever_writes_a_file_returns_none():
    returned = {
        name: inspect.signature(function).return_annotation
        for name, function in CALLABLES.items()
        if name.rpartition(".")[2].startswith(("save", "export", "plot", "write"))
    }
    assert len(returned) == 16
    assert set(returned.values()) == {"None"}, returned


def handed_out(cls):
    """The types of the public fields, properties and results of a class."""
    hints = typing.get_type_hints(cls)
    yield from (hint for name, hint in hints.items() if not name.startswith("_"))
    for member in own(cls).values():
        function = member.fget if isinstance(member, property) else member
        if isinstance(function, FunctionType):
            yield typing.get_type_hints(function).get("return")


def ours(hint):
    """The classes of qrecipe in an annotation."""
    if isinstance(hint, type) and hint.__module__.startswith("qrecipe."):
        yield hint
    for argument in typing.get_args(hint):
        yield from ours(argument)


def test_every_type_that_is_handed_out_is_public():
    hints = [typing.get_type_hints(function).get("return") for function in FUNCTIONS.values()]
    hints += [hint for cls in CLASSES.values() for hint in handed_out(cls)]
    found = {cls for hint in hints for cls in ours(hint)}
    assert len(found) > 25
    assert {cls.__name__ for cls in found if PUBLIC.get(cls.__name__) is not cls} == set()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def made():
    """A value of each kind, of a model and a recipe with hostile names, made in silence."""
    torch.manual_seed(0)
    names = [MARK, *(f"layer{number}" for number in range(5)), f"last{MARK}"]
    model = nn.Sequential(OrderedDict((name, nn.Linear(8, 8)) for name in names)).eval()
    batches = [torch.randn(16, 8) for _ in range(3)]
    expected = model(batches[0]).detach()
    recipe = qrecipe.parse_recipe(RECIPE)
    patches = pytest.MonkeyPatch()
    hurry(patches)
    patches.setattr(sys, "stderr", Terminal())
    try:
        compiled = qrecipe.compile(model, recipe, batches[0])
        prepared = compiled.prepare()
        qrecipe.calibrate(prepared, batches, progress=False)
        converted = qrecipe.quantize(model, recipe, batches, progress=False)
        values = {
            "CompiledRecipe": compiled,
            "Plan": compiled.plan,
            "Provenance": qrecipe.provenance(converted),
            "Bench": qrecipe.bench(model, recipe, batches, runtimes=["torch"], progress=False),
            "Comparison": qrecipe.compare(model, converted, batches, progress=False),
            "Drift": qrecipe.drift(converted, batches, progress=False),
            "Fastest": qrecipe.fastest(model, recipe, batches, progress=False),
            "Profile": qrecipe.profile(model, recipe, batches, progress=False),
            "Ranking": qrecipe.sensitivity(model, recipe, batches, progress=False),
            "TuningResult": qrecipe.tune(
                model,
                recipe,
                batches,
                torch.no_grad()(lambda tried: -float((tried(batches[0]) - expected).norm())),
                max_drop=0.0,
                max_trials=8,
                progress=False,
            ),
            **_transformation(),
            "Pool": qrecipe.Pool(ThreadPoolExecutor),
            "Recipe": recipe,
            "Publisher": qrecipe.Publisher("acme", "1.0"),
        }
        written = sys.stderr.getvalue()
    finally:
        patches.undo()
    many = "".join(f'"no{number}" = "float"\n' for number in range(50))
    with pytest.raises(qrecipe.PlanError) as caught:
        qrecipe.plan(model, qrecipe.parse_recipe(RECIPE + many), batches[0])
    values["PlanError"] = caught.value
    deviation = qrecipe.Deviation(MARK, "Linear", 1, 8, None)
    values["Lowering"] = qrecipe.Lowering("XNNPACK", 2, (MARK,), 1.0, (deviation,) * 50)
    return SimpleNamespace(values=values, written=written)


def _transformation():
    layers = (nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = nn.Sequential(
        OrderedDict(zip((MARK, "relu", f"last{MARK}"), layers, strict=True))
    ).eval()
    given = []

    @qrecipe.register_transform("noting")
    class Noting(qrecipe.Transform):
        def apply(self, model, context):
            given[:] = [context]

    tables = '[transform.equalize]\nby = "weights"\n[transform.smooth]\nalpha = 0.5\n'
    recipe = qrecipe.parse_recipe(f"{RECIPE}\n{tables}[transform.noting]\nenabled = true\n")
    batches = [torch.randn(16, 8) for _ in range(3)]
    changed = qrecipe.transform(model, recipe, batches, progress=False)
    registered.remove("transform", "noting")
    (context,) = given
    return {
        "Transformation": qrecipe.transformation(changed),
        "TransformContext": context,
    }


def parts(value, seen):
    """A value and the public values in it."""
    if isinstance(value, (tuple, list, frozenset)):
        for item in value:
            yield from parts(item, seen)
    elif isinstance(value, typing.Mapping):
        yield from parts(tuple(value.values()), seen)
    elif type(value) in CLASSES.values() and id(value) not in seen:
        seen[id(value)] = value
        yield value
        names = [*typing.get_type_hints(type(value)), *own(type(value)), "findings"]
        for name in dict.fromkeys(names):
            if not name.startswith("_") and not callable(getattr(value, name, None)):
                yield from parts(getattr(value, name, None), seen)


@pytest.fixture(scope="module")
def everything(made):
    return list(parts(tuple(made.values.values()), {}))


def test_a_value_of_nearly_every_public_class_is_at_hand(everything):
    kinds = {type(value).__name__ for value in everything}
    others = {name for name, cls in CLASSES.items() if not issubclass(cls, Exception)}
    assert others - kinds == {"QatSchedule", "Transform"}


def test_progress_false_is_silence_on_a_terminal(made):
    assert made.written == ""


def test_the_repr_of_every_value_is_a_few_lines(everything):
    long = {
        type(value).__name__: len(repr(value))
        for value in everything
        if len(repr(value)) >= 1_000 or repr(value).count("\n") > 12
    }
    assert long == {}


def test_every_value_can_be_hashed_and_equal_ones_agree(everything):
    for value in everything:
        hash(value)
        if type(value).__name__ not in ("CompiledRecipe", "Plan"):  # they hold a model
            again = copy.deepcopy(value)
            assert again != value or hash(again) == hash(value)


def test_values_are_frozen_and_so_are_the_mappings_in_them(everything):
    for value in everything:
        if is_dataclass(value):
            with pytest.raises(AttributeError):
                setattr(value, fields(value)[0].name, None)
    frozen = [
        mapping
        for value in everything
        if is_dataclass(value) and not isinstance(value, qrecipe.Inputs)
        for field in fields(value)
        if isinstance(mapping := getattr(value, field.name), typing.Mapping)
        and not field.name.startswith("_")
    ]
    assert frozen
    assert [mapping for mapping in frozen if hasattr(mapping, "__setitem__")] == []


REPORTS = ["Plan", "Ranking", "Comparison", "Drift", "Provenance", "TuningResult"]


@pytest.mark.parametrize("name", REPORTS)
def test_notebooks_show_results_as_escaped_html(made, name):
    html = made.values[name]._repr_html_()
    assert "<script" not in html
    assert ESCAPED in html
    tree = ElementTree.fromstring(f"<div>{html}</div>")
    assert tree.findall(".//td")
    tags = {
        "div",
        "section",
        "h4",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "p",
        "pre",
    }
    assert {element.tag for element in tree.iter()} <= tags


@pytest.mark.parametrize("name", REPORTS)
def test_the_html_has_each_row_of_the_text(made, name):
    value = made.values[name]
    tree = ElementTree.fromstring(f"<div>{value._repr_html_()}</div>")
    shown = "".join(tree.itertext())
    assert [word for word in str(value).split() if word not in shown and word[0] != "─"] == []
