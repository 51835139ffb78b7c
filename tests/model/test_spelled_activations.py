"""Spelled-out activations are one call of torch's function, in graphs and module by module."""

from __future__ import annotations

import copy
import math
import operator
import random

import pytest
import torch
import torch.nn.functional as F
from plans import net_of, recipe, sites
from runs import silent
from torch import fx, nn
from training import qat_recipe

import qrecipe
from qrecipe.errors.findings import ConflictError
from qrecipe.model.rewrites.activations import elementwise_calls, spelled_out

X = torch.linspace(-9, 9, 4001).reshape(1, -1)
ROWS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
DYNAMIC = recipe(base="builtin:x86-dynamic")
EAGER = recipe(base="builtin:x86-dynamic", head='executor = "eager"')
ROOT = math.sqrt(2.0)
BETA = math.sqrt(2.0 / math.pi)


def spelled(forward, **modules):
    """What the last call of a function spells out: its name, and how it is approximated."""
    graph = fx.symbolic_trace(net_of(lambda self, x: forward(self, x), **modules)).graph
    found = spelled_out(next(iter(reversed(graph.nodes))).args[0], elementwise_calls(graph))
    if found is None:
        return None
    return found.activation.function.__name__, *found.activation.kwargs.values()


TANH, ERF = ("gelu", "tanh"), ("gelu",)
SPELLINGS = {
    "NewGELUActivation": (
        TANH,
        lambda self, x: 0.5 * x * (1.0 + torch.tanh(BETA * (x + 0.044715 * torch.pow(x, 3.0)))),
    ),
    "FastGELUActivation": (
        TANH,
        lambda self, x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    ),
    "a cube": (
        TANH,
        lambda self, x: x * (torch.tanh((x**3 * 0.044715 + x) * BETA).add(1) / 2),
    ),
    "a product, distributed": (
        TANH,
        lambda self, x: (x * 0.5) + (x / 2) * (BETA * x + x * x * x * 0.044715 * BETA).tanh(),
    ),
    "in place": (
        TANH,
        lambda self, x: (x + 0.044715 * x.pow(3)).mul_(BETA).tanh_().add_(1).mul_(x).mul_(0.5),
    ),
    "nn.Tanh": (
        TANH,
        lambda self, x: 0.5 * x * (1 + self.act(BETA * (x + 0.044715 * x.pow(3)))),
    ),
    "a sigmoid": (
        TANH,
        lambda self, x: x * torch.sigmoid(2 * BETA * (x + 0.044715 * x**3)),
    ),
    "GELUActivation": (ERF, lambda self, x: x * 0.5 * (1.0 + torch.erf(x / ROOT))),
    "erf, multiplied": (ERF, lambda self, x: (torch.erf(x * 0.70710678) + 1) * x / 2),
    "erfc": (ERF, lambda self, x: torch.erfc(-x / ROOT) * (0.5 * x)),
    "SiLU": (("silu",), lambda self, x: x * torch.sigmoid(x)),
    "SiLU, in place": (("silu",), lambda self, x: x.sigmoid().mul_(x)),
    "SiLU by exp": (("silu",), lambda self, x: x / (1 + torch.exp(-x))),
    "Mish": (("mish",), lambda self, x: x * torch.tanh(F.softplus(x))),
    "hardswish": (("hardswish",), lambda self, x: x * F.relu6(x + 3) / 6),
    "hardswish, nn.ReLU6": (("hardswish",), lambda self, x: self.six(3 + x) / 6 * x),
    "hardswish, clamp": (("hardswish",), lambda self, x: x * (x + 3).clamp(min=0, max=6) / 6),
    "hardswish, hardtanh": (
        ("hardswish",),
        lambda self, x: x * F.hardtanh(x + 3, 0.0, 6.0) * 0.16666667,
    ),
    "hardswish of hardsigmoid": (("hardswish",), lambda self, x: F.hardsigmoid(x) * x),
    "hardsigmoid": (("hardsigmoid",), lambda self, x: F.relu6(x + 3, inplace=True) / 6),
    "hardsigmoid, clamp": (("hardsigmoid",), lambda self, x: torch.clamp(x / 6 + 0.5, 0, 1)),
}
"""What is spelled out, and how."""


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_recognised_by_what_it_computes(name):
    expected, forward = SPELLINGS[name]
    assert spelled(forward, act=nn.Tanh(), six=nn.ReLU6(inplace=True)) == expected


NEAR = {
    "another cube": lambda x: 0.5 * x * (1 + torch.tanh(BETA * (x + 0.0447 * x**3))),
    "a coarse root": lambda x: 0.5 * x * (1 + torch.tanh(0.797885 * (x + 0.044715 * x**3))),
    "a coarse root of 2": lambda x: 0.5 * x * (1 + torch.erf(x / 1.414214)),
    "QuickGELU": lambda x: x * torch.sigmoid(1.702 * x),
    "a square": lambda x: 0.5 * x * (1 + torch.tanh(BETA * (x + 0.044715 * x**2))),
    "without 1": lambda x: 0.5 * x * torch.tanh(BETA * (x + 0.044715 * x**3)),
    "Swish": lambda x: x * torch.sigmoid(1.5 * x),
    "a coarse sixth": lambda x: x * F.relu6(x + 3) * 0.1667,
    "relu instead of relu6": lambda x: x * F.relu(x + 3) / 6,
    "another limit": lambda x: x * (x + 3).clamp(0, 6.5) / 6,
    "a limit that is far": lambda x: x.clamp(max=1e4) * torch.sigmoid(x),
    "rounded on the way": lambda x: (y := x + 12582912.0 - 12582912.0) * 0 + x * torch.sigmoid(y),
    "a whole number": lambda x: torch.div(x * F.relu6(x + 3), 6, rounding_mode="floor"),
    "another tensor": lambda x: x * torch.sigmoid(x.flip(1)),
    "its mean": lambda x: x * torch.sigmoid(x.mean(1, keepdim=True)),
    "a number at each place": lambda x: x * torch.sigmoid(x) * torch.ones(4001),
    "torch's own": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("name", NEAR)
def test_what_computes_something_else_is_left(name):
    assert spelled(lambda self, x: NEAR[name](x)) is None


def either(draw, function, a, b):
    return function(*((a, b) if draw.random() < 0.5 else (b, a)))


def times(draw, number, x):
    """The product of a number and a tensor, in one of many spellings."""
    choice = draw.randrange(4)
    if choice == 0:
        return x / (1 / number)
    if choice == 1:
        return torch.mul(x, number)
    return either(draw, operator.mul, x, number) if choice == 2 else number * x


def cube(draw, x):
    ways = (lambda: x**3, lambda: x.pow(3.0), lambda: torch.pow(x, 3), lambda: x * x * x)
    return draw.choice([*ways, lambda: x * x.square()])()


def anyhow(seed, k=0.044715):
    """A GELU by tanh, in random order and in random spellings."""

    def forward(self, x):
        draw = random.Random(seed)
        if draw.random() < 0.3:
            inner = times(draw, BETA, x * (1 + times(draw, k, x * x)))
        elif draw.random() < 0.3:
            inner = either(
                draw, torch.add, times(draw, BETA, x), times(draw, BETA * k, cube(draw, x))
            )
        else:
            inner = times(draw, BETA, either(draw, torch.add, x, times(draw, k, cube(draw, x))))
        bent = draw.choice([torch.tanh, lambda y: y.tanh(), self.act])(inner)
        one = draw.choice([lambda: 1 + bent, lambda: bent + 1.0, lambda: bent - -1])()
        factors = [lambda y: times(draw, 0.5, y), lambda y: either(draw, torch.mul, x, y)]
        draw.shuffle(factors)
        for factor in factors:
            one = factor(one)
        return one

    return forward


def test_any_order_of_operands_and_constants_is_recognised():
    for seed in range(60):
        assert spelled(anyhow(seed), act=nn.Tanh()) == TANH, seed
        assert spelled(anyhow(seed, k=0.04471), act=nn.Tanh()) is None, seed


class Spelling(nn.Module):
    """As activations are classes in transformers."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, input):
        return SPELLINGS[self.name][1](self, input)


def model(name):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), Spelling(name), nn.Linear(8, 3)).eval()


MEMBERS = {
    "NewGELUActivation": ("1:mul", "1:pow", "1:mul#1", "1:add", "1:mul#2", "1:tanh", "1:add#1"),
    "GELUActivation": ("1:mul", "1:div", "1:erf", "1:add"),
    "hardswish": ("1:add", "1:relu6", "1:mul"),
    "SiLU": ("1:sigmoid",),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_it_is_one_site_with_the_names_of_its_calls(name):
    plan = qrecipe.plan(model(name), recipe(), ROWS)
    _, site, _ = plan
    assert (site.op, site.name) == (SPELLINGS[name][0][0], MEMBERS[name][0])
    assert site.members[:-1] == MEMBERS[name]
    assert site.verdict == ("quantized" if name == "hardswish" else "float")
    assert plan.boundaries == (2 if name == "hardswish" else 4)


@pytest.mark.parametrize("a_recipe", [recipe(), DYNAMIC, EAGER], ids=["static", "dynamic", "eager"])
@pytest.mark.parametrize("name", MEMBERS)
def test_it_is_as_exact_as_torchs_and_can_be_stored(name, a_recipe, tmp_path):
    kind, *settings = SPELLINGS[name][0]
    made = {"gelu": nn.GELU, "hardswish": nn.Hardswish, "silu": nn.SiLU}[kind](*settings)
    own = model(name)
    before = copy.deepcopy(own)
    converted = qrecipe.quantize(own, a_recipe, [ROWS] * 10, progress=silent)
    plain = nn.Sequential(own[0], made, own[2]).eval()
    expected = qrecipe.quantize(plain, a_recipe, [ROWS] * 10, progress=silent)
    assert torch.equal(converted(ROWS), expected(ROWS))
    assert type(own[1]) is Spelling
    assert own.state_dict().keys() == before.state_dict().keys()
    qrecipe.save_quantized(converted, tmp_path / "q.safetensors")
    loaded = qrecipe.load_quantized(tmp_path / "q.safetensors", model(name))
    assert torch.equal(loaded(ROWS), converted(ROWS))


def test_module_by_module_it_is_torchs_module_under_its_own_path_and_class():
    own = model("NewGELUActivation")
    converted = qrecipe.quantize(own, EAGER, [ROWS])
    assert isinstance(converted[1], nn.GELU)
    assert converted[1].approximate == "tanh"
    for kind in (f"{__name__}.Spelling", "torch.nn.GELU"):
        rule = f'[rules.module_type]\n"{kind}" = "float"'
        plan = qrecipe.plan(
            own, recipe(rule, base="builtin:x86-dynamic", head='executor = "eager"'), ROWS
        )
        assert plan["1"].rule.key == kind


def test_module_by_module_a_module_with_more_stays():
    class Scaled(Spelling):
        def __init__(self):
            super().__init__("GELUActivation")
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, input):
            return super().forward(input) * self.scale

    class Twice(Spelling):
        def forward(self, input):
            return super().forward(super().forward(input))

    class Held(Spelling):
        def __init__(self):
            super().__init__("nn.Tanh")
            self.act = nn.Tanh()

    hooked = Spelling("GELUActivation")
    hooked.register_forward_hook(lambda module, args, output: None)
    for act in (Scaled(), Twice("SiLU"), Held(), hooked):
        own = nn.Sequential(nn.Linear(6, 8), act, nn.Linear(8, 3)).eval()
        converted = qrecipe.quantize(own, EAGER, [ROWS])
        assert type(converted[1]) is type(act)
        if type(act) is Held:
            named = recipe(
                '[rules.module_name]\n"1.act" = "float"',
                base="builtin:x86-dynamic",
                head='executor = "eager"',
            )
            assert "1.act" in sites(qrecipe.plan(own, named, ROWS))


def test_module_by_module_a_module_that_is_called_by_keyword_stays():
    own = net_of(lambda self, x: self.act(x=self.fc(x)), fc=nn.Linear(6, 8), act=ByKeyword())
    converted = qrecipe.quantize(own, EAGER, [ROWS])
    assert type(converted.act) is ByKeyword


class ByKeyword(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


def test_what_else_reads_a_part_keeps_the_parts():
    def forward(self, x):
        x = self.fc(x)
        gate = torch.sigmoid(x)
        return x * gate, gate

    plan = qrecipe.plan(net_of(forward, fc=nn.Linear(6, 6)), recipe(), ROWS)
    assert [site.op for site in plan] == ["Linear", "sigmoid", "mul"]


def test_a_hardsigmoid_that_others_read_too_is_one():
    def forward(self, x):
        x = self.fc(x)
        gate = F.relu6(x + 3) / 6
        return x * gate, gate

    plan = qrecipe.plan(net_of(forward, fc=nn.Linear(6, 6)), recipe(), ROWS)
    assert [site.op for site in plan] == ["Linear", "hardsigmoid", "mul"]


def test_a_module_inside_with_a_hook_keeps_the_parts():
    act = nn.Tanh()
    act.register_forward_hook(lambda module, args, output: None)
    own = net_of(SPELLINGS["nn.Tanh"][1], act=act)
    plan = qrecipe.plan(nn.Sequential(nn.Linear(6, 6), own).eval(), recipe(), ROWS)
    assert "gelu" not in [site.op for site in plan]
    assert "it has hooks" in plan["1.act"].reason


def test_a_rule_that_names_a_part_decides_with_the_whole():
    own = nn.Sequential(nn.Linear(6, 6), net_of(SPELLINGS["nn.Tanh"][1], act=nn.Tanh())).eval()
    (site,) = (site for site in qrecipe.plan(own, recipe(), ROWS) if site.op == "gelu")
    assert "1.act" in site.members
    with pytest.raises(ConflictError, match="QR304"):
        qrecipe.plan(own, recipe('[rules.module_name]\n"1.act" = "float"'), ROWS)


def test_a_rule_for_torchs_function_names_it():
    rules = '[rules.function]\n"torch.nn.functional.hardswish" = "float"'
    plan = qrecipe.plan(model("hardswish"), recipe(rules), ROWS)
    assert plan["1:add"].rule.key == "torch.nn.functional.hardswish"
    rules = '[rules.function]\n"torch.nn.functional.silu" = "int8"'
    plan = qrecipe.plan(model("SiLU"), recipe(rules), ROWS)
    assert plan["1:sigmoid"].verdict == "quantized"


def test_a_backend_without_the_whole_keeps_the_parts():
    for name in ("hardswish", "SiLU"):
        plan = qrecipe.plan(
            model(name), recipe(base="builtin:x86-static", head='backend = "executorch"'), ROWS
        )
        assert SPELLINGS[name][0][0] not in [site.op for site in plan]


def test_it_is_trained_as_torchs():
    compiled = qrecipe.compile(model("hardswish"), qat_recipe(), ROWS)
    assert [site.op for site in compiled.plan] == ["Linear", "hardswish", "Linear"]
    prepared = compiled.prepare()
    prepared(ROWS).sum().backward()
    assert all(each.grad is not None for each in prepared.parameters() if each.requires_grad)


def test_pt2e_has_one_operator_too():
    plan = qrecipe.plan(model("NewGELUActivation"), recipe(head='executor = "pt2e"'), ROWS)
    assert [site.op for site in plan] == ["Linear", "gelu", "Linear"]
    converted = qrecipe.quantize(
        model("NewGELUActivation"), recipe(head='executor = "pt2e"'), [ROWS] * 10, progress=silent
    )
    assert converted(ROWS).shape == (8, 3)
