"""Graphs compared call by call, passing over what returns its input."""

from __future__ import annotations

import torch
from torch import fx, nn

import qrecipe
from qrecipe.model.rewrite_proof import _is_the_same
from qrecipe.model.same_graph import observes, same_calls

STATIC = 'format = 1\nextends = "builtin:x86-static"\n[lint]\nignore = ["QR201"]\n'


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x))) + x * 2


def never(node):
    return False


def prepared_and_fused():
    torch.manual_seed(0)
    compiled = qrecipe.compile(Net().eval(), qrecipe.parse_recipe(STATIC), torch.randn(4, 6))
    return compiled._parts[0].prepare_at_once(), compiled.graph_module


def same(prepared, fused):
    return same_calls(fused.graph, prepared.graph, never, observes)


def test_a_graph_with_observers_makes_the_same_calls():
    prepared, fused = prepared_and_fused()
    assert len(prepared.graph.nodes) > len(fused.graph.nodes)
    assert same(prepared, fused)
    assert _is_the_same(prepared, fused)


def changed(change):
    prepared, fused = prepared_and_fused()
    nodes = {
        str(getattr(node.target, "__name__", node.target)): node for node in prepared.graph.nodes
    }
    change(prepared, nodes)
    prepared.graph.lint()
    return prepared, fused


def without_tanh(prepared, nodes):
    nodes["tanh"].replace_all_uses_with(nodes["tanh"].args[0])
    prepared.graph.erase_node(nodes["tanh"])


def other_number(prepared, nodes):
    nodes["mul"].args = (nodes["mul"].args[0], 3)


def other_input(prepared, nodes):
    nodes["mul"].args = (nodes["tanh"], 2)


def other_function(prepared, nodes):
    nodes["tanh"].target = torch.sigmoid


def turned_round(prepared, nodes):
    nodes["one"].target, nodes["two"].target = "two", "one"


def test_any_other_call_constant_input_or_module_is_seen():
    for change in (without_tanh, other_number, other_input, other_function, turned_round):
        prepared, fused = changed(change)
        assert not same(prepared, fused), change.__name__


def test_a_module_with_other_tensors_class_or_forward_is_not_the_same():
    for change in (
        lambda own: setattr(own, "weight", nn.Parameter(own.weight.detach().clone())),
        lambda own: vars(own).update(forward=lambda x: x),
    ):
        prepared, fused = prepared_and_fused()
        change(prepared.get_submodule("one"))
        assert same(prepared, fused)
        assert not _is_the_same(prepared, fused)
    prepared, fused = prepared_and_fused()
    prepared.set_submodule("one", type("Other", (nn.Linear,), {})(6, 6))
    assert not _is_the_same(prepared, fused)


def test_graphs_of_the_same_length_in_another_order_prove_nothing():
    def graph(first, second):
        made = fx.Graph()
        x = made.placeholder("x")
        made.output(made.call_function(second, (made.call_function(first, (x,)),)))
        return made

    assert same_calls(graph(torch.neg, torch.abs), graph(torch.neg, torch.abs), never, never)
    assert not same_calls(graph(torch.neg, torch.abs), graph(torch.abs, torch.neg), never, never)
