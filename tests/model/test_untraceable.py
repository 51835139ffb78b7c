"""How forward is called in a trace, and the line that a trace error names."""

from __future__ import annotations

import calendar
import copy
import functools

import numpy as np
import pytest
import torch
from failures import only
from plans import ROWS, net_of, sites
from runs import STATIC
from torch import nn

import qrecipe
from qrecipe.errors.findings import TraceError


def linear():
    torch.manual_seed(0)
    return nn.Linear(6, 6)


def decorated(forward):
    @functools.wraps(forward)
    def call(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    return call


def _by_keyword(self, x, *, scale=2.0, mask=None, **more):
    return self.fc(x * scale)


def _scaled(self, x, scale):
    return self.fc(x * scale)


WRITTEN = {
    "decorated": decorated(_by_keyword),
    "decorated twice": decorated(decorated(_by_keyword)),
    "keyword only": _by_keyword,
    "no grad": torch.no_grad()(_by_keyword),
    "partial": functools.partialmethod(_scaled, scale=2.0),
}


@pytest.mark.parametrize("how", WRITTEN)
@pytest.mark.parametrize("inputs", [ROWS, {"x": ROWS}], ids=["positional", "by name"])
def test_a_forward_is_traced_however_it_is_wrapped(how, inputs):
    model = net_of(WRITTEN[how], fc=linear())
    plan = qrecipe.plan(model, STATIC, inputs)
    assert sites(plan)["fc"].verdict == "quantized"


def test_a_forward_that_an_instance_replaces_is_the_one_that_is_traced():
    model = net_of(lambda self, x: self.fc(x), fc=linear())
    model.forward = functools.partial(_rectified, model)
    assert sites(qrecipe.plan(model, STATIC, ROWS))["fc"].members == ("fc", ":relu")


def _rectified(self, x):
    return self.fc(x).relu()


class Answer:
    def __init__(self, value):
        self.value = value


def _formats(self, x):
    return self.fc(x), f"{x.shape[0]:d}"


LINES = {
    "what it returns": lambda self, x: Answer(self.fc(x)),
    "a generator": lambda self, x: (y for y in [self.fc(x)]),
    "an array": lambda self, x: self.fc(x) * np.sqrt(x.shape[1]),
    "a copy": lambda self, x: self.fc(copy.deepcopy(x)),
    "a library": lambda self, x: self.fc(x) * calendar.monthrange(2000, x.shape[1])[1],
    "a format": _formats,
    "a bare decorator": lambda *args, **kwargs: args[0].fc(args[1]),
}


@pytest.mark.parametrize("kind", LINES)
def test_whatever_stops_a_trace_a_line_of_the_callers_code_is_named(kind):
    with pytest.raises(TraceError) as caught:
        qrecipe.plan(net_of(LINES[kind], fc=linear()), STATIC, ROWS)
    message = only(caught, "QR305").message
    assert "test_untraceable.py:" in message
    assert "See the torch.fx docs" not in message


def test_what_a_graph_cannot_hold_is_named():
    with pytest.raises(TraceError, match="it returns a Answer, which a graph cannot hold"):
        qrecipe.plan(net_of(LINES["what it returns"], fc=linear()), STATIC, ROWS)


def test_a_forward_that_has_no_signature_is_an_error_of_ours():
    class Callable:
        def __get__(self, owner, kind):
            return self if owner is None else functools.partial(self, owner)

        def __call__(self, owner, x):
            return owner.fc(x)

    with pytest.raises(TraceError, match="QR305"):
        qrecipe.plan(net_of(Callable(), fc=linear()), STATIC, ROWS)
