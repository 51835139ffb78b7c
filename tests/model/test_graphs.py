"""The compiled graph is the model, and making it leaves no trace elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from failures import only, rows
from plans import ROWS, named, net_of, sites
from runs import STATIC, float_at, silent
from torch import nn

import qrecipe
from qrecipe.errors.findings import PlanError, TraceError


def linear():
    return nn.Linear(6, 6)


def assert_same(model, x):
    graph = qrecipe.compile(model, STATIC, x).graph_module
    assert torch.allclose(graph(x), model(x), atol=1e-6)
    return graph


def test_only_readers_behind_a_change_in_place_read_what_was_changed():
    def forward(self, x):
        y = self.fc(x)
        doubled = y * 0.5
        y.add_(1)
        return doubled + y

    assert_same(net_of(forward, fc=linear()), torch.randn(4, 6))


def test_a_view_as_another_dtype_stays_a_view():
    def forward(self, x):
        return self.fc(x).view(torch.int32).view(torch.float32)

    assert_same(net_of(forward, fc=linear()), torch.randn(4, 6))


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 2), (2, 2), (5, 3), ((3, 1), (2, 1))])
def test_padding_given_as_a_word_counts_the_dilation(kernel, dilation):
    conv = nn.Conv2d(3, 4, kernel, dilation=dilation, padding="same")
    graph = assert_same(net_of(lambda self, x: self.conv(x), conv=conv), torch.randn(2, 3, 9, 9))
    assert not isinstance(graph.conv.padding, str)
    assert conv.padding == "same"


def test_an_argument_that_is_a_word_is_a_constant_of_the_graph():
    def forward(self, x, act="relu"):
        return F.relu(self.fc(x)) if act == "relu" else F.hardswish(self.fc(x))

    model = net_of(forward, fc=linear())
    assert list(sites(qrecipe.plan(model, STATIC, ROWS))) == ["fc"]
    given = qrecipe.plan(model, STATIC, {"x": ROWS, "act": "hardswish"})
    assert list(sites(given)) == ["fc", ":hardswish"]


@pytest.mark.parametrize("stars", [1, 2])
def test_arguments_of_any_number_are_refused_if_they_are_given(stars):
    def positional(self, x, *rest):
        return self.fc(x)

    def by_keyword(self, x, **rest):
        return self.fc(x)

    model = net_of((positional, by_keyword)[stars - 1], fc=linear())
    assert list(sites(qrecipe.plan(model, STATIC, ROWS))) == ["fc"]
    with pytest.raises(TraceError) as caught:
        qrecipe.plan(model, STATIC, ((ROWS, ROWS), {"x": ROWS, "y": ROWS})[stars - 1])
    message = only(caught, "QR305").message
    assert f"takes {'*' * stars}rest at " in message
    assert "test_graphs.py:" in message


def test_what_an_earlier_preparation_left_behind_decides_nothing():
    model = net_of(lambda self, x: self.b(self.a(x)), a=linear(), b=linear())
    model.a.qconfig = torch.ao.quantization.get_default_qconfig("x86")
    compiled = qrecipe.compile(model, named(a="float"), ROWS)
    assert not any(hasattr(module, "qconfig") for module in compiled.graph_module.modules())
    converted = qrecipe.quantize(model, float_at(["a"]), rows(), progress=silent)
    assert type(converted.a) is nn.Linear
    assert hasattr(model.a, "qconfig")


def test_a_forward_that_draws_random_numbers_leaves_the_callers_generator_alone():
    model = net_of(lambda self, x: self.fc(x) + torch.randn(6), fc=linear())
    before = torch.get_rng_state()
    with pytest.raises(PlanError) as caught:
        qrecipe.plan(model, STATIC, ROWS)
    only(caught, "QR306")
    assert torch.equal(torch.get_rng_state(), before)


class Adds(nn.Module):
    def forward(self, x):
        return x + x


def test_functions_whose_names_read_alike_are_decided_each_on_its_own():
    model = net_of(
        lambda self, x: self.a_b(self.second(self.a.b(self.first(x)))),
        first=linear(),
        second=linear(),
        a=nn.Module(),
        a_b=Adds(),
    )
    model.a.b = Adds()
    for name, other in (("a.b:add", "a_b:add"), ("a_b:add", "a.b:add")):
        compiled = qrecipe.compile(model, float_at([name]), ROWS)
        prepared = compiled.prepare()
        qrecipe.calibrate(prepared, rows(), progress=silent)
        compiled.convert(prepared)
        found = sites(compiled.plan)
        assert (found[name].verdict, found[other].verdict) == ("float", "quantized")
