"""Plain data for tests of the resolver: a small model's structure, and rules."""

from __future__ import annotations

from dataclasses import replace

from qrecipe.errors.findings import Location
from qrecipe.recipe.recipe import QConfigSpec, Rule
from qrecipe.recipe.schema import TensorSpec
from qrecipe.registry.builtin import function_family
from qrecipe.rules.resolution import resolve
from qrecipe.rules.structure import Member, ModelStructure, Operation, enclosing


def spec(dtype, **keys):
    return TensorSpec.model_validate({"observer": "minmax", "dtype": dtype, **keys})


INT8 = QConfigSpec(spec("int8"), spec("uint8"))
INT4 = QConfigSpec(spec("int4"), spec("uint8"))

CLASSES = {
    "": "models.ResNet",
    "conv1": "torch.nn.modules.conv.Conv2d",
    "bn1": "torch.nn.modules.batchnorm.BatchNorm2d",
    "relu": "torch.nn.modules.activation.ReLU",
    "layer1": "torch.nn.modules.container.Sequential",
    "layer1.0": "models.Block",
    "layer1.0.conv1": "torch.nn.modules.conv.Conv2d",
    "layer1.0.conv2": "torch.nn.modules.conv.Conv2d",
    "layer1.0.relu": "torch.nn.modules.activation.ReLU",
    "layer10": "torch.nn.modules.conv.Conv2d",
    "layer4": "torch.nn.modules.container.Sequential",
    "layer4.0": "torch.nn.modules.linear.Linear",
    "layer4.1": "torch.nn.modules.linear.Linear",
    "unused": "torch.nn.modules.linear.Linear",
}
PUBLIC = {
    name: frozenset({name, f"torch.nn.{name.rpartition('.')[2]}"})
    for name in CLASSES.values()
    if name.startswith("torch.")
}


def module(path, call=0):
    return Member(
        name=f"{path}#{call}" if call else path,
        op=CLASSES[path].rpartition(".")[2],
        module=path,
        types=PUBLIC[CLASSES[path]],
        functions=frozenset(),
        scopes=enclosing(path),
    )


def call(path, function, number=0):
    family = function_family(function)
    return Member(
        name=f"{path}:{family}" + (f"#{number}" if number else ""),
        op=family,
        module=None,
        types=frozenset(),
        functions=frozenset({family, function}),
        scopes=enclosing(path),
    )


def structure(*groups, aliases=()):
    return ModelStructure(
        operations=tuple(Operation(tuple(group), "observed", ()) for group in groups),
        modules={path: PUBLIC.get(name, frozenset({name})) for path, name in CLASSES.items()},
        bases={path: frozenset() for path in CLASSES},
        aliases=dict(aliases),
    )


NET = structure(
    [module("conv1"), module("bn1"), module("relu")],
    [module("layer1.0.conv1")],
    [module("layer1.0.relu")],
    [module("layer1.0.conv2")],
    [call("layer1.0", "operator.add"), module("layer1.0.relu", 1)],
    [call("layer1.0", "torch.add", 1)],
    [module("layer10")],
    [module("layer4.0")],
    [module("layer4.1")],
    [call("", "torch.flatten")],
    aliases={"first": "conv1", "layer4.2": "layer4.1"},
)
SITES = [operation.name for operation in NET.operations]


def rule(tier, key="", qconfig=INT8, **changes):
    """A rule; each key has a line of its own, so that locations tell rules apart."""
    label = {id(INT8): "int8", id(INT4): "int4", id(None): "float"}.get(id(qconfig), "inline")
    line = sum(map(ord, tier + key)) % 997 + 1
    made = Rule(
        tier=tier,
        key=key,
        qconfig=qconfig,
        label=label,
        reason=None,
        expect=None,
        optional=False,
        location=Location("recipe.toml", line, 1, 5, f'"{key}" = "{label}"'),
        layer="recipe.toml",
        overrides=frozenset(),
    )
    return replace(made, **changes)


def name(key, qconfig=INT8, **changes):
    return rule("module_name", key, qconfig, **changes)


def kind(key, qconfig=INT8, **changes):
    return rule("module_type", key, qconfig, **changes)


def function(key, qconfig=INT8, **changes):
    return rule("function", key, qconfig, **changes)


GLOBAL = rule("global")


def winners(*rules, net=NET):
    """The key of the rule that decides each site; there must be nothing wrong."""
    resolution = resolve(net, [GLOBAL, *rules])
    assert resolution.findings == ()
    return {site: decision.rule.key for site, decision in resolution.decisions.items()}


def covered(a_rule, net=NET):
    return list(resolve(net, [GLOBAL, a_rule]).covered[a_rule])


def findings(*rules, net=NET):
    return resolve(net, [GLOBAL, *rules]).findings


def only_finding(*rules, net=NET):
    (finding,) = findings(*rules, net=net)
    return finding
