"""A plan as text: what a row says, what is said once, and what is left out; at any width."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import qrecipe
from qrecipe.terminal import tables


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(8, 4)

    def forward(self, x):
        return self.classifier(self.pool(self.second(self.first(x))).flatten(1))


def planned(recipe):
    torch.manual_seed(0)
    text = f'format = 1\nextends = "builtin:{recipe}"\n[lint]\nignore = ["QR208"]\n'
    loaded = qrecipe.parse_recipe(text)
    return qrecipe.plan(Block().eval(), loaded, torch.rand(2, 3, 8, 8))


def text_at(plan, columns, monkeypatch):
    monkeypatch.setattr(tables, "_is_on_terminal", lambda: columns is not None)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((columns or 1, 24)))
    return str(plan)


@pytest.mark.parametrize("columns", [80, 120])
def test_a_site_is_a_line_and_no_word_is_broken_at_the_widths_of_terminals(monkeypatch, columns):
    plan = planned("x86-static")
    text = text_at(plan, columns, monkeypatch)
    assert max(map(len, text.splitlines())) <= columns
    for site in plan:
        (line,) = [line for line in text.splitlines() if line.startswith(f"{site.name} ")]
        assert line.split()[1:4] == [site.op, site.verdict, site.dtypes]
    words = set(text_at(plan, None, monkeypatch).split())
    assert {word for word in words if "─" not in word} <= set(text.split())


def test_the_rule_that_decides_most_sites_is_named_once(monkeypatch):
    text = text_at(planned("x86-static"), None, monkeypatch)
    assert "decided by" not in text.splitlines()[2]
    assert text.count("global = int8") == 1
    assert "\nAll 5 sites are decided by global = int8.\n" in text


def test_rules_that_decide_fewer_sites_are_named_in_their_rows(monkeypatch):
    text = text_at(planned("x86-dynamic"), None, monkeypatch)
    assert "decided by" in text.splitlines()[2]
    assert text.count('module_type "torch.nn.Linear" = int8-dynamic') == 1
    assert "\n4 of 5 sites are decided by global = float.\n" in text


def test_unused_rules_of_shipped_recipes_are_counted_and_listed_if_asked_for(monkeypatch):
    plan = planned("x86-dynamic")
    text = text_at(plan, None, monkeypatch)
    assert "torch.nn.LSTM" not in text
    assert "Not listed: 6 rules of builtin:x86-dynamic for what this model does not have." in text
    assert plan.with_all_rules().count(" unused ") == 6
    assert len(plan.rules) == 8


def test_an_unused_rule_of_ones_own_is_listed(monkeypatch):
    recipe = 'format = 1\nextends = "builtin:x86-static"\n[rules.module_type]\n'
    recipe = qrecipe.parse_recipe(f'{recipe}"torch.nn.LSTM" = "float"\n')
    plan = qrecipe.plan(Block().eval(), recipe, torch.rand(2, 3, 8, 8))
    text = text_at(plan, None, monkeypatch)
    assert 'module_type "torch.nn.LSTM"' in text
    assert "Not listed" not in text
