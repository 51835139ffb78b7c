"""Every static built-in recipe on every architecture: the model is what the plan says.

A small architecture and a quarter of the toy nets always, these with one recipe each; half of the
toy nets with the plain static one in `tests/execution/test_execution.py`; the rest with
``-m slow``.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from itertools import product

import pytest
import torch
from corpus import TORCHVISION, missing
from differential import (
    execute,
    forget_models,
    half_float,
    outputs,
    snapshot,
    wrong_classes,
    wrong_kernels,
    wrongly_assigned,
)
from nets import NETS

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db, sqnr_db
from qrecipe.execution.fx.structure import realised_sites

RECIPES = ("x86-static", "x86-vnni-static", "x86-static-histogram", "arm-static")
SHARES = ("all", "half")
"""How many of the sites the recipe quantizes; the others are left float by their exact names."""

ALWAYS = {
    "squeezenet1_1": {("x86-static", "all"), ("arm-static", "half")},
}
"""What runs in any case: each engine, and each share."""
IN_TURN = (
    ("x86-vnni-static", "all"),
    ("arm-static", "half"),
    ("x86-static-histogram", "all"),
    ("arm-static", "all"),
)
"""What the toy nets run, each net one of them, and five of twenty nets always."""
BATCHES = 10

LEAST_DB = 14.0
"""What ends below it has warned: 15 dB, and the decibel that the audit lets pass."""


def _runs():
    for name in TORCHVISION:
        for recipe, share in product(RECIPES, SHARES):
            marks = [pytest.mark.skipif(missing() is not None, reason=str(missing()))]
            if (recipe, share) not in ALWAYS.get(name, ()):
                marks.append(pytest.mark.slow)
            values = ("torchvision", name, recipe, share)
            yield pytest.param(values, id=f"{name}-{recipe}-{share}", marks=marks)
    for (at, name), recipe, share in product(enumerate(NETS), RECIPES, SHARES):
        # the static recipe is in tests/execution/test_execution.py
        is_quick = at % 5 == 2 and (recipe, share) == IN_TURN[at % len(IN_TURN)]
        marks = [] if is_quick else [pytest.mark.slow]
        yield pytest.param(
            ("own", name, recipe, share), id=f"own-{name}-{recipe}-{share}", marks=marks
        )


@lru_cache(maxsize=1)
def subject(kind, name):
    """A model, its batches and what its caller sees; every run of it must leave it like that."""
    net = (TORCHVISION if kind == "torchvision" else NETS)[name]
    model = net.model()
    return model, net.batches(BATCHES), snapshot(model)


@pytest.fixture(params=_runs(), scope="module")
def run(request):
    kind, name, recipe, share = request.param
    if kind == "torchvision":
        forget_models()
    model, batches, _ = subject(kind, name)
    base = f"builtin:{recipe}"
    loaded = qrecipe.load_recipe(base)
    if share == "all":
        return execute(model, batches, loaded)
    names = [site.name for site in qrecipe.plan(model, loaded, batches[0]).sites]
    return execute(model, batches, half_float(names, base, zlib.crc32(f"{name} {recipe}".encode())))


@pytest.fixture
def before(request, run):
    """The snapshot of the model that ``run`` had."""
    kind, name, *_ = request.node.callspec.params["run"]
    return subject(kind, name)[2]


def test_fx_assigned_the_very_qconfigs_of_the_plan(run):
    assert wrongly_assigned(run) == {}


def test_every_site_became_what_the_plan_says(run):
    realised = realised_sites(run.converted)
    became = {name: realised[name].became if name in realised else None for name in run.sites}
    assert became == {site.name: site.mode or "float" for site in run.plan.sites}
    assert wrong_classes(run) == {}


def test_every_kernel_gives_what_its_float_operation_gives_rounded(run):
    assert wrong_kernels(run, run.batches[1]) == {}


def test_a_result_far_from_the_float_model_has_warned(run):
    expected, actual = (outputs(m, run.batches[0]) for m in (run.model, run.converted))
    assert [tensor.shape for tensor in expected] == [tensor.shape for tensor in actual]
    assert not any(tensor.is_quantized for tensor in actual)
    assert output_sqnr_db(expected, actual) > LEAST_DB or run.codes & {"QR203", "QR226"}


def test_the_float_output_depends_on_the_input(run):
    """A zero or constant output would make every comparison of outputs vacuous."""
    one, two = outputs(run.model, run.batches[0]), outputs(run.model, run.batches[1])
    assert one
    assert all(tensor.any() for tensor in one)
    assert all(torch.isfinite(tensor).all() for tensor in one)
    assert any(sqnr_db(a, b) < 30 for a, b in zip(one, two, strict=True))


def test_the_callers_model_is_bit_identical_afterwards(run, before):
    assert snapshot(run.model) == before
    assert not any(hasattr(module, "qconfig") for module in run.model.modules())
