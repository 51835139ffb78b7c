"""The time of each site and boundary. No test looks at how long anything takes."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace

import pytest
import torch
from nets import NETS, UNTRACEABLE
from routed import Routed
from runs import HEAD, silent
from torch import nn

import qrecipe
from qrecipe.measure.pages.page import page_html
from qrecipe.measure.pages.reports import profile_page
from qrecipe.measure.profile.passes import Boundary, in_channels_last
from qrecipe.measure.turns import Stopwatch, Timing
from qrecipe.terminal import tables

CALM = '[lint]\nignore = ["QR201", "QR203", "QR208"]\n'
STATIC = qrecipe.parse_recipe(HEAD + CALM)


def profiled(model, batches, recipe=STATIC):
    return qrecipe.profile(model, recipe, batches, progress=silent)


@pytest.fixture(scope="module")
def residual():
    net = NETS["residual"]
    model, batches = net.model(), net.batches(3)
    return qrecipe.plan(model, STATIC, batches[0]), profiled(model, batches)


def test_every_site_of_the_plan_has_a_time_in_both_models(residual):
    plan, profile = residual
    assert {site.name: site.verdict for site in profile.sites} == {
        site.name: site.verdict for site in plan.sites
    }
    quantized = [site for site in profile.sites if site.verdict == "quantized"]
    assert quantized
    for times in ("float_time", "channels_last_time", "int8_time", "quantize_time"):
        assert all(getattr(site, times).seconds > 0 for site in quantized), times
    losses = [site.loss for site in profile.sites]
    assert losses == sorted(losses, reverse=True)


def test_each_boundary_of_the_plan_is_timed_once(residual):
    plan, profile = residual
    assert len(profile.boundaries) == plan.boundaries
    assert {each.direction for each in profile.boundaries} == {"quantize", "dequantize"}
    assert all(each.time.seconds > 0 for each in profile.boundaries)


@pytest.mark.parametrize("columns", [24, 40, 60, 80, 100, 140])
def test_the_table_of_sites_fits_the_terminal(residual, monkeypatch, columns):
    _, profile = residual
    long = [replace(each, name=f"layer1.0.downsample.{each.name}") for each in profile.sites]
    profile = replace(profile, sites=tuple(long))
    monkeypatch.setattr(tables, "_is_on_terminal", lambda: True)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((columns, 24)))
    table = str(profile).partition("\n\n")[0].splitlines()
    assert max(map(len, table)) <= columns
    assert ("operation" in table[0]) is (columns > 100)
    assert table[0].startswith("site")
    text = "".join(table)
    assert all(f"{1000 * each.int8_time.seconds:.3f}" in text for each in long)


def test_the_conditions_are_those_of_the_run(residual):
    _, profile = residual
    conditions = profile.conditions
    assert conditions.threads == torch.get_num_threads()
    assert conditions.torch == torch.__version__
    assert "float32" in conditions.batch
    assert conditions.text in str(profile)


def test_json_has_what_the_report_has(residual):
    _, profile = residual
    document = json.loads(profile.to_json())
    assert [site["name"] for site in document["sites"]] == [site.name for site in profile.sites]
    assert math.isclose(document["sums"]["int8"], profile.int8_sum)
    assert document["whole"]["eager"]["seconds"] == profile.eager.seconds
    assert len(document["boundaries"]) == len(profile.boundaries)


def test_a_sum_that_is_far_from_the_whole_is_said(residual):
    _, profile = residual
    fitting = replace(
        profile,
        fused=Timing(profile.float_sum, 0.0),
        int8=Timing(profile.int8_sum * 1.05, 0.0),
    )
    assert "add up" not in str(fitting)
    odd = replace(fitting, int8=Timing(profile.int8_sum * 2, 0.0))
    assert "The int8 times add up" in str(odd)
    assert "The float times add up" not in str(odd)


def test_a_model_without_a_graph_is_profiled_by_its_modules():
    dynamic = qrecipe.parse_recipe(f'format = 1\nextends = "builtin:x86-dynamic"\n{CALM}')
    profile = profiled(UNTRACEABLE.model(), UNTRACEABLE.batches(2), dynamic)
    assert [site for site in profile.sites if site.verdict == "quantized"]
    assert all(site.float_time.seconds > 0 for site in profile.sites)
    assert all(site.int8_time.seconds > 0 for site in profile.sites)
    assert profile.boundaries == ()


def test_a_model_with_roots_is_profiled_inside_them():
    torch.manual_seed(0)
    roots = qrecipe.parse_recipe(f'{HEAD}{CALM}[fx]\nroots = ["backbone", "head"]\n')
    profile = profiled(Routed().eval(), [torch.randn(4, 3, 8, 8)] * 2, roots)
    assert {(each.direction, each.tensor) for each in profile.boundaries} == {
        ("quantize", "input backbone.x"),
        ("quantize", "input head.x"),
        ("dequantize", "backbone.conv"),
        ("dequantize", "head.fc2"),
    }
    timed = {site.name for site in profile.sites if site.int8_time.seconds > 0}
    assert {"backbone.conv", "head.fc1", "head.fc2"} <= timed


def test_the_callers_model_batches_and_recipe_for_training_are_served():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qat = qrecipe.parse_recipe(f'{HEAD}phase = "qat"\n{CALM}')
    batches = iter([torch.randn(2, 4), torch.randn(2, 4)])
    with pytest.warns(qrecipe.QRecipeWarning, match="QR202") as warned:
        profile = profiled(model, batches, qat)
    assert len(warned) == 1
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [site.name for site in profile.sites] == ["0"]


class Twice(nn.Module):
    """Calls a module twice, and needs contiguous images."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(16, 16)

    def forward(self, x):
        return self.fc(self.fc(self.conv(x).contiguous().view(-1, 16)))


def test_a_module_that_is_called_twice_has_both_calls():
    profile = profiled(Twice().eval(), [torch.randn(2, 3, 2, 2)] * 2)
    assert {"fc", "fc#1"} <= {site.name for site in profile.sites}
    assert all(s.channels_last_time.seconds > 0 for s in profile.sites if s.op == "Linear")


def test_what_does_not_take_channels_last_is_timed_as_it_is():
    class Viewing(nn.Module):
        def forward(self, x):
            return x.view(-1, 16)

    calls = [qrecipe.Inputs((torch.randn(2, 4, 2, 2),))]
    assert in_channels_last(Viewing(), calls) is calls
    (taken,) = in_channels_last(nn.Identity(), calls)
    assert taken.args[0].is_contiguous(memory_format=torch.channels_last)


def test_times_of_one_round_add_up_and_the_lower_quartile_counts():
    stopwatch = Stopwatch()
    for seconds in (5.0, 1.0, 2.0, 3.0, 4.0):
        stopwatch.start_round()
        stopwatch.add("a", seconds / 2)
        stopwatch.add("a", seconds / 2)
        if seconds > 4:
            stopwatch.add(Boundary("quantize", "b"), seconds)
    found = stopwatch.timings()
    assert found["a"] == Timing(2.0, 2.0)
    assert found[Boundary("quantize", "b")] == Timing(0.0, 0.0)


def test_the_page_shows_the_worst_and_escapes_names(residual, undrawn):
    pytest.importorskip("matplotlib")
    _, profile = residual
    net = NETS["residual"]
    converted = qrecipe.quantize(net.model(), STATIC, net.batches(2), progress=silent)
    odd = replace(profile, sites=(replace(profile.sites[0], name="<script>"), *profile.sites[1:]))
    page = page_html(profile_page(odd, qrecipe.provenance(converted), {}))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "Boundaries" in page
