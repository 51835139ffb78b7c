"""Broken plugins are named at the line of the recipe, and spoil nothing else."""

from __future__ import annotations

import sys

import pytest
import torch
from distributions import install, observer_module
from plugin_recipes import RECIPE, model, plan_with, recipe_with, refused, under_caret

import qrecipe
from qrecipe.errors.findings import (
    PluginError,
    UnknownNameError,
)
from qrecipe.recipe.validation import MAX_FINDINGS
from qrecipe.registry import table as registered
from qrecipe.registry.entry_points import entry_points

CONTRACT = observer_module("mine").replace(
    "    pass", "    def forward(self, x):\n        return super().forward(x) * 2"
)

WEIRD = """
class Weird(BaseException):
    def __str__(self):
        raise RuntimeError("no text")
raise Weird
"""

FORGED = """
from qrecipe.errors.findings import PluginError
raise PluginError("not findings")
"""

WARNING = """
from qrecipe.errors.findings import Finding, PluginError
raise PluginError([Finding("QR201", "x"), Finding("QR999", "y")])
"""

BROKEN = {
    "raises": ("raise ValueError('first\\nsecond')", "QR152", "ValueError: first"),
    "exits": ("raise SystemExit(3)", "QR152", "SystemExit: 3"),
    "imports nothing": ("import not_installed_at_all", "QR152", "No module named"),
    "syntax": ("def", "QR152", "SyntaxError"),
    "weird": (WEIRD, "QR152", "Weird"),
    "forged": (FORGED, "QR152", "PluginError"),
    "escape": ("raise ValueError('\\x1b[2J\\u202e')", "QR152", "ValueError: \ufffd[2J\ufffd"),
    "long": ("raise ValueError('x' * 10**6)", "QR152", "ValueError: xxx"),
    "registers nothing": ("", "QR153", "it registers nothing"),
    "another name": (observer_module("mina"), "QR153", 'it registers observer "mina"'),
    "breaks the contract": (CONTRACT, "QR150", "changes the tensor that it observes"),
    "torch's own name": (observer_module("minmax"), "QR151", "is built in"),
    "itself": (
        f"import qrecipe\nqrecipe.plan(None, qrecipe.parse_recipe({RECIPE!r}"
        ".format(observer='\"mine\"')), None)",
        "QR152",
        "it registers nothing",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_plugin_is_named_with_its_distribution_at_the_line_of_the_recipe(site, how):
    source, code, says = BROKEN[how]
    install(site, "Acme.Observers", {"observer.mine": "acme_mine"}, "3.1", acme_mine=source)
    table, filters = registered.snapshot(), list(sys.path)
    first = refused('"mine"')
    assert first.code == code
    assert says in str(first)
    assert 'observer "mine" of Acme.Observers 3.1' in first.message
    assert under_caret(first) == '"mine"'
    assert len(str(first)) < 1500
    assert registered.snapshot() == table
    assert sys.path == filters
    assert refused('"mine"') == first  # and the second time


def test_findings_that_a_plugin_makes_up_do_not_pass_for_ours(site):
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine=WARNING)
    with pytest.raises(PluginError) as caught:
        plan_with('"mine"')
    assert [finding.code for finding in caught.value.findings] == ["QR152", "QR152"]


def test_the_line_where_a_plugin_failed_is_said(site):
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine="\n\nraise ValueError\n")
    assert refused('"mine"').notes == (f"raised at {site / 'acme_mine.py'}:3",)


def test_a_plugin_that_fails_halfway_leaves_no_registration_behind(site):
    source = observer_module("mine") + observer_module("extra", "Extra") + "\nraise ValueError\n"
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine=source)
    assert refused('"mine"').code == "QR152"
    assert registered.find("observer", "extra") is None
    with pytest.raises(UnknownNameError):
        recipe_with('"extra"')


def test_ctrl_c_during_an_import_is_no_finding(site):
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        plan_with('"mine"')


DAMAGE = {
    "entry_points.txt": b"[qrecipe.plugins]\nno equals sign\n",
    "METADATA": b"Version: 1.0\n",
    "binary": b"\xff\xfe\x00qrecipe.plugins\x80",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_metadata_of_one_distribution_do_not_hide_the_others(site, what):
    install(site, "damaged", {"observer.lost": "lost"})
    file = "entry_points.txt" if what == "binary" else what
    (site / "damaged-1.0.dist-info" / file).write_bytes(DAMAGE[what])
    (site / "bare-1.0.dist-info").mkdir()
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine=observer_module("mine"))
    assert [p.name for p in entry_points("qrecipe.plugins")] == ["observer.mine"]
    plan_with('"mine"')


def test_thousands_of_tensors_of_a_broken_plugin_import_it_once(site):
    counting = "import builtins\nbuiltins.acme = getattr(builtins, 'acme', 0) + 1\nraise OSError\n"
    install(site, "acme", {"observer.mine": "acme_mine"}, acme_mine=counting)
    import builtins

    tensors = "".join(
        f'[tensor.t{n}]\ndtype = "uint8"\nqscheme = "per_tensor_affine"\nobserver = "mine"\n'
        for n in range(1100)
    )
    recipe = qrecipe.parse_recipe(RECIPE.format(observer='"minmax"') + tensors)
    try:
        with pytest.raises(PluginError) as caught:
            qrecipe.plan(model(), recipe, torch.rand(2, 4))
        assert len(caught.value.findings) == MAX_FINDINGS
        assert builtins.acme == 1
    finally:
        del builtins.acme
