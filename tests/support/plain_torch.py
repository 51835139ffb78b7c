"""FX graph mode as torch alone offers it, in few words: for tests that show what it does.

Where one of these tests fails with a new torch, torch may have mended what qrecipe works round.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import torch
from torch.ao.quantization import QConfig, QConfigMapping
from torch.ao.quantization.observer import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from qrecipe.execution.engine import engine


def activation(kind=MovingAverageMinMaxObserver, **keys):
    return kind.with_args(**{"dtype": torch.quint8, "qscheme": torch.per_tensor_affine, **keys})


def weight(kind=PerChannelMinMaxObserver, **keys):
    return kind.with_args(**{"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric, **keys})


def per_tensor_weight(**keys):
    return weight(MinMaxObserver, **{"qscheme": torch.per_tensor_symmetric, **keys})


INT8 = QConfig(activation=activation(), weight=weight())


def mapping(of_all=None):
    return QConfigMapping().set_global(of_all)


def everything(**qconfig):
    """A mapping of one qconfig for all, ``INT8`` but for what is given."""
    return mapping(INT8._replace(**qconfig))


def prepared(model, rules, x, **options):
    with engine("x86"):
        return prepare_fx(model, rules, (x,), **options)


def calibrated(model, rules, x, **options):
    observing = prepared(model, rules, x, **options)
    observing(x)
    return observing


def converted(model, rules, x, **options):
    with engine("x86"):
        return convert_fx(calibrated(model, rules, x, **options), **options)


def observed(model, rules, x, **options):
    """The names of the nodes that torch decided to quantize."""
    attributes = prepared(model, rules, x, **options).meta["_observed_graph_module_attrs"]
    return attributes.observed_node_names


def quantized(model):
    """The paths of the modules that the graph calls on an int8 kernel."""
    return {path for path, kind in called(model).items() if ".quantized.modules" in kind.__module__}


def called(model):
    """The class of each module that the graph calls, by path."""
    calls = [node.target for node in model.graph.nodes if node.op == "call_module"]
    return {path: type(model.get_submodule(path)) for path in calls}


def functions(model):
    """What the graph calls that is no module."""
    return [node.target for node in model.graph.nodes if node.op.startswith("call_f")]


_NOTICES = ("deprecated", "Please use quant_min and quant_max")


@contextmanager
def silence():
    """Nothing is said inside but what torch says about its own future at every call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(warning.message) for warning in caught]
    assert [text for text in said if not any(notice in text for notice in _NOTICES)] == []
