"""The cost of each step is linear in the number of layers; calls are counted, not seconds."""

import cProfile
import pstats
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from torch import fx, nn

import qrecipe
from qrecipe.execution.fx import convert, patches
from qrecipe.planning.backend import backend_config

RECIPE = "builtin:x86-static"
QAT = qrecipe.parse_recipe(f'format = 1\nphase = "qat"\nextends = "{RECIPE}"\n')
LAYERS = 6
NOTICEABLE = 0.003
"""The share of all calls from which on a function counts."""


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        nn.init.constant_(self.bn.weight, 0.1)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)) + x)


def linear_chain(layers):
    pairs = [each for _ in range(layers) for each in (nn.Linear(8, 8), nn.ReLU())]
    for linear in pairs[::2]:
        nn.init.eye_(linear.weight)
    return nn.Sequential(*pairs).eval(), [torch.randn(2, 8) for _ in range(10)]


def residual_chain(layers):
    blocks = [Residual() for _ in range(layers)]
    return nn.Sequential(*blocks).eval(), [torch.randn(2, 4, 5, 5) for _ in range(10)]


def plan(make, layers, path):
    model, batches = make(layers)
    return lambda: qrecipe.plan(model, RECIPE, batches[0])


def quantize(make, layers, path):
    model, batches = make(layers)
    return lambda: qrecipe.quantize(model, RECIPE, batches)


def store(make, layers, path):
    model, batches = make(layers)
    quantized = qrecipe.quantize(model, RECIPE, batches)

    def run():
        qrecipe.save_quantized(quantized, path)
        qrecipe.load_quantized(path, model)

    return run


def estimate(make, layers, path):
    model, batches = make(layers)
    return lambda: qrecipe.sensitivity(model, RECIPE, batches[:2], method="estimate")


def calls_of(run):
    """The number of calls of each function, builtin or not, by file, line and name."""
    profile = cProfile.Profile()
    profile.runcall(run)
    stats = pstats.Stats(profile).stats
    return {function: calls for function, (_, calls, *_) in stats.items()}


class Joined(nn.Module):
    def forward(self, x):
        return torch.cat([x[:, :4], x[:, 4:]], 1)


def joined_chain(layers):
    blocks = [each for _ in range(layers) for each in (nn.MaxPool1d(1), nn.Flatten(), Joined())]
    return nn.Sequential(nn.Linear(8, 8), *blocks).eval(), [torch.randn(2, 8) for _ in range(10)]


CASES = [*product((plan, quantize, store, estimate), (linear_chain, residual_chain, joined_chain))]
ALWAYS = [
    (quantize, residual_chain),
    (store, linear_chain),
    (estimate, linear_chain),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("step", "make"),
    [pytest.param(*case, marks=[] if case in ALWAYS else [pytest.mark.slow]) for case in CASES],
)
def test_twice_the_layers_take_at_most_twice_the_calls_of_any_function(step, make, tmp_path):
    path = tmp_path / "model.safetensors"
    step(make, 2, path)()  # imports and caches
    few, many = (calls_of(step(make, count, path)) for count in (LAYERS, 2 * LAYERS))
    total = sum(many.values())
    steeper = {
        function: (few.get(function, 0), calls)
        for function, calls in many.items()
        if calls > NOTICEABLE * total and calls > 2.2 * few.get(function, 0)
    }
    assert steeper == {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "recipe"),
    [
        (linear_chain, RECIPE),
        (residual_chain, QAT),
        pytest.param(linear_chain, QAT, marks=pytest.mark.slow),
        pytest.param(residual_chain, RECIPE, marks=pytest.mark.slow),
    ],
)
def test_observers_are_where_torch_inserts_them_with_all_its_repetition(make, recipe, monkeypatch):
    model, batches = make(12)
    compiled = qrecipe.compile(model, recipe, batches[0])
    ours = compiled.prepare()
    monkeypatch.setattr(convert, "without_repetition", lambda *_: nullcontext())
    torchs = compiled.prepare()
    assert ours.code == torchs.code
    assert [name for name, _ in ours.named_modules()] == [n for n, _ in torchs.named_modules()]


def test_unused_modules_are_those_that_torch_deletes():
    def with_unused():
        inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        model = nn.Sequential(
            nn.Sequential(inner, nn.Linear(2, 2)), nn.Linear(2, 2), nn.Linear(2, 2)
        )
        graph_module = fx.GraphModule(model, fx.Graph())
        for name, module in model.named_children():
            graph_module.add_submodule(name, module)
        x = graph_module.graph.placeholder("x")
        called = graph_module.graph.call_module("0.0", (x,))
        weight = graph_module.graph.get_attr("2.weight")
        graph_module.graph.output((weight, called))
        return graph_module

    ours, torchs = with_unused(), with_unused()
    patches.delete_unused_submodules(ours)
    torchs.delete_all_unused_submodules()
    names = [name for name, _ in ours.named_modules()]
    assert names == [name for name, _ in torchs.named_modules()]
    assert "0.0.1" in names
    assert "0.1" not in names


def test_torchs_own_functions_are_back_after_a_failure():
    names = patches.prepare.__globals__
    former = dict(names)
    changed = []

    def fail():
        with patches.without_repetition(nn.Linear(1, 1), backend_config("x86")):
            changed.extend(name for name in names if names[name] is not former[name])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert "get_new_attr_name_with_prefix" in changed
    assert names == former
