"""Which sites a model has and what they are called; the groups are those that FX itself makes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, Aliased, Mlp, Residual, SharedConv
from plans import net_of
from shares import every
from torch import nn
from torch.ao.quantization.quantize_fx import fuse_fx

from qrecipe.errors.findings import PlanError
from qrecipe.model.addresses import CALLS
from qrecipe.model.call import Inputs
from qrecipe.model.graph_sites import take_inventory
from qrecipe.model.nodes import module_of
from qrecipe.planning.backend import backend_config
from qrecipe.recipe.schema import FxTable

GROUPS = {
    "residual": [
        "conv1 bn1 relu",
        "pool",
        "layer1.0.conv1 layer1.0.bn1 layer1.0.relu",
        "layer1.0.conv2 layer1.0.bn2",
        "layer1.0:add layer1.0.relu#1",
        "layer1.1.conv1 layer1.1.bn1 layer1.1.relu",
        "layer1.1.conv2 layer1.1.bn2",
        "layer1.1:add layer1.1.relu#1",
        "head",
        ":flatten",
        "fc",
    ],
    "depthwise": ["stem.0", "stem.1", "depthwise bn", "act", "pointwise", ":mean"],
    "shared_conv": ["conv relu", "conv#1"],
    "shared_conv_two_norms": ["conv bn1", "conv#1 bn2"],
    "functional": [":conv2d :relu", ":chunk", ":cat", ":mean", ":linear", ":add"],
    "binary": [
        "a",
        "b",
        ":add",
        ":add#1",
        ":add#2",
        ":mul",
        ":add#3",
        ":transpose",
        ":matmul",
        ":matmul#1",
    ],
    "shapes": ["conv", ":view", ":permute", ":reshape", "fc", ":reshape#1", ":mean"],
    "attention": [
        "norm",
        "qkv",
        ":reshape",
        ":permute",
        ":unbind",
        ":transpose",
        ":matmul",
        ":mul",
        "softmax",
        ":matmul#1",
        ":transpose#1",
        ":reshape#1",
        "out",
        ":add",
    ],
    "squeeze_excite": ["conv", "act", "pool", "down :relu", "up", "gate", ":mul"],
    "decoder": ["down.0 down.1", "up", ":cat", "last"],
    "tagger": ["embedding", "fc", ":mul"],
    "recurrent": ["lstm", ":getitem", "fc"],
    "cnn_lstm": [":flatten", "conv bn relu", "pool", ":reshape", "lstm", ":getitem", "fc"],
    "cells": ["gru", ":getitem", "lstm_cell", "gru_cell", "rnn_cell", "fc"],
    "norms": ["conv", "group", ":mean", "layer", "fc", ":layer_norm"],
    "keywords": ["a", "b", ":add :relu", "c"],
    "aliased": ["first :relu"],
    "in_place": ["fc relu", ":add"],
    "nested": ["body.0.0 body.0.1", "body.1.1.0", "body.1.1.1", "head"],
    "mlp": ["fc1 :relu", "fc2"],
}


def inventory_of(model, batch, backend="x86", **table):
    return take_inventory(
        model, Inputs.from_batch(batch), FxTable(**table), backend_config(backend), "ptq"
    )


def inventory_of_net(name):
    net = NETS[name]
    return inventory_of(net.model(), net.batches(1)[0])


def names(inventory):
    return [operation.name for operation in inventory.structure.operations]


def groups(inventory):
    return [
        " ".join(member.name for member in operation.members)
        for operation in inventory.structure.operations
    ]


def test_every_toy_net_has_its_expected_groups():
    assert GROUPS.keys() == NETS.keys()


@pytest.mark.parametrize("name", NETS)
def test_sites_are_named_by_the_first_member_of_each_group_in_order_of_execution(name):
    assert groups(inventory_of_net(name)) == GROUPS[name]


@pytest.mark.parametrize("name", NETS)
def test_every_floating_call_belongs_to_exactly_one_site_and_knows_it(name):
    inventory = inventory_of_net(name)
    owners = {}
    for match in inventory.matches.values():
        for node in match.nodes:
            assert node not in owners
            owners[node] = match.operation.name
    for node in inventory.parts[0].graph_module.graph.nodes:
        assert node.meta.get("site") == owners.get(node)
        if node.op == "call_module":
            assert node in owners
    members = [m.name for op in inventory.structure.operations for m in op.members]
    assert len(members) == len(set(members))


# torch corrupts shared convolutions, drops what is changed in place, does not know torch.relu, and
# leaves layers functions
TORCH_DIFFERS = ("shared_conv", "shared_conv_two_norms", "in_place", "aliased", "mlp", "functional")


@pytest.mark.parametrize("name", every(2, (name for name in NETS if name not in TORCH_DIFFERS)))
def test_fused_modules_are_those_that_torch_fuses(name):
    net = NETS[name]
    ours = inventory_of(net.model(), net.batches(1)[0]).parts[0].graph_module
    theirs = fuse_fx(net.model())
    assert _called_modules(ours) == _called_modules(theirs)


def _called_modules(graph_module):
    """Paths, a second call's own copy under the original's, and classes; not what does nothing."""
    return [
        (node.target.partition("__call")[0], kind)
        for node in graph_module.graph.nodes
        if node.op == "call_module"
        and (kind := type(graph_module.get_submodule(node.target))) is not nn.Dropout
    ]


def test_a_module_called_twice_fuses_each_call_as_its_own_neighbours_demand():
    model = SharedConv().eval()
    x = torch.randn(2, 3, 8, 8)
    inventory = inventory_of(model, x)
    first, second = (match.nodes[0] for match in inventory.matches.values())
    assert first.target == "conv"
    assert second.target != "conv"
    twin = inventory.parts[0].graph_module.get_submodule(second.target)
    assert type(twin) is nn.Conv2d
    assert twin.weight is model.conv.weight
    assert torch.allclose(inventory.parts[0].graph_module(x), model(x), atol=1e-6)


@pytest.mark.parametrize("name", every(2, NETS))
def test_the_normalised_and_fused_graph_computes_what_the_model_computes(name):
    net = NETS[name]
    model, batch = net.model(), net.batches(1)[0]
    inventory = inventory_of(model, batch)
    inputs = Inputs.from_batch(batch)
    with torch.no_grad():
        expected, actual = inputs.call(model), inputs.call(inventory.parts[0].graph_module)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_sizes_attributes_and_integer_arithmetic_are_no_sites():
    def forward(self, x, tokens):
        n = x.size(0) * 2 // 2
        half = x.shape[1] // 2
        index = (tokens + 1) * half
        mask = index > 3
        y = self.conv(x)
        return y.reshape(n, -1).to(self.other.dtype), mask

    net = net_of(forward, conv=nn.Conv2d(3, 4, 1))
    net.other = torch.zeros(1, dtype=torch.float64)
    inventory = inventory_of(net, (torch.randn(2, 3, 4, 4), torch.arange(4)))
    assert names(inventory) == ["conv", ":reshape", ":to"]


def test_taking_a_tuple_apart_is_no_site_but_indexing_a_tensor_is_one():
    inventory = inventory_of_net("recurrent")
    assert names(inventory) == ["lstm", ":getitem", "fc"]
    assert inventory.matches[":getitem"].operation.producers == ("lstm",)


def test_a_call_is_addressed_by_the_module_whose_forward_makes_it():
    class Inner(nn.Module):
        def forward(self, x):
            return F.gelu(x) - F.gelu(x)

    net = net_of(lambda self, x: F.gelu(self.outer(x)), outer=nn.Sequential(Inner(), Inner()))
    inside = [":gelu", ":gelu#1", ":sub"]
    expected = [f"outer.{index}{name}" for index in (0, 1) for name in inside]
    assert names(inventory_of(net, torch.randn(2, 4))) == [*expected, ":gelu"]


def test_spellings_of_one_function_count_as_one_family():
    def forward(self, x):
        y = x.add(x)
        y = torch.add(y, x)
        y = y + x
        y += x
        return y @ torch.matmul(x, x) * torch.mul(y, x).mul(y)

    net = net_of(forward)
    assert names(inventory_of(net, torch.randn(4, 4))) == [
        ":add",
        ":add#1",
        ":add#2",
        ":add#3",
        ":matmul",
        ":matmul#1",
        ":mul",
        ":mul#1",
        ":mul#2",
    ]


def test_names_count_calls_in_the_users_own_order_before_anything_is_rewritten():
    def forward(self, x):
        unread = x + 1  # noqa: F841
        return x + 2

    assert names(inventory_of(net_of(forward), torch.randn(2, 2))) == [":add"]


def test_an_alias_is_known_under_its_first_name():
    model = Aliased().eval()
    structure = inventory_of(model, torch.randn(2, 6)).structure
    assert structure.aliases == {"second": "first"}
    assert set(structure.modules) == {"", "first", "unused"}
    assert structure.operations[0].members[0].module == "first"


def test_a_module_without_a_call_or_with_an_unread_result_is_no_site():
    assert names(inventory_of(Aliased().eval(), torch.randn(2, 6))) == ["first"]


def test_members_carry_types_functions_and_scopes_for_the_resolver():
    operation = inventory_of_net("residual").matches["layer1.0:add"].operation
    add, relu = operation.members
    assert add.module is None
    assert "add" in {name.rpartition(".")[2] for name in add.functions} | add.functions
    assert add.scopes == ("layer1.0", "layer1", "")
    assert relu.module == "layer1.0.relu"
    assert {"torch.nn.ReLU", "torch.nn.modules.activation.ReLU"} <= relu.types
    assert relu.scopes == ("layer1.0.relu", "layer1.0", "layer1", "")
    assert operation.producers == ("layer1.0.conv2", "pool")


def test_producers_are_found_through_tuples_and_model_inputs_by_name():
    matches = inventory_of_net("keywords").matches
    assert matches["a"].operation.model_inputs == ("first",)
    assert matches["b"].operation.model_inputs == ("second",)
    assert matches[":add"].operation.producers == ("a", "b")
    assert inventory_of_net("attention").matches[":matmul#1"].operation.producers == (
        "softmax",
        ":unbind",
    )


@pytest.mark.parametrize(
    "backend", ["x86", "fbgemm", "onednn", "qnnpack", "executorch", "tensorrt"]
)
def test_every_backend_gives_the_residual_net_sites_that_cover_the_same_members(backend):
    net = NETS["residual"]
    inventory = inventory_of(net.model(), net.batches(1)[0], backend)
    members = {m.name for op in inventory.structure.operations for m in op.members}
    assert members == set(" ".join(GROUPS["residual"]).split())


def test_a_non_traceable_module_is_one_site_with_nothing_inside():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else x

    net = net_of(
        lambda self, x: self.head(self.branch(x)), branch=Branching(), head=nn.Linear(4, 2)
    )
    inventory = inventory_of(net, torch.randn(2, 4), non_traceable_module_name=["branch"])
    assert names(inventory) == ["branch", "head"]
    assert inventory.matches["branch"].operation.kind == "unmatched"
    kind = f"{Branching.__module__}.{Branching.__qualname__}"
    by_class = inventory_of(net, torch.randn(2, 4), non_traceable_module_class=[kind])
    assert names(by_class) == ["branch", "head"]


def test_inputs_by_position_and_by_keyword_give_the_same_sites():
    net = NETS["keywords"]
    batch = net.batches(1)[0]
    by_keyword = inventory_of(net.model(), batch)
    by_position = inventory_of(net.model(), (batch["first"], batch["second"]))
    assert groups(by_keyword) == groups(by_position)


def test_the_inventory_leaves_the_model_as_it_was():
    model = Residual().train()
    model.qconfig = "mine"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    inventory_of(model, torch.randn(2, 3, 8, 8))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(module.training for module in model.modules())
    assert model.qconfig == "mine"


def test_a_buffer_that_forward_counts_up_stays_as_it_was():
    def forward(self, x):
        self.calls += 1
        return self.fc(x)

    net = net_of(forward, fc=nn.Linear(4, 4))
    net.register_buffer("calls", torch.zeros(1))
    with pytest.raises(PlanError, match="writes to calls"):
        inventory_of(net, torch.randn(2, 4))
    assert net.calls.item() == 0


def test_an_in_place_call_that_nobody_reads_is_kept():
    inventory = inventory_of_net("in_place")
    x = torch.randn(4, 6)
    model = NETS["in_place"].model()
    assert torch.allclose(inventory.parts[0].graph_module(x), model(x), atol=1e-6)


def test_an_operator_whose_name_ends_with_an_underscore_changes_nothing_in_place():
    def forward(self, x):
        wanted, other = x > 0, x > 1
        wanted & other
        return self.fc(x).masked_fill(wanted, 0.0)

    net = net_of(forward, fc=nn.Linear(4, 4))
    x = torch.randn(8, 4)
    graph_module = inventory_of(net, x).parts[0].graph_module
    assert torch.equal(graph_module(x), net(x))


def test_functions_in_torch_spelling_are_rewritten_where_only_these_have_a_kernel():
    net = net_of(lambda self, x: x.sigmoid() @ x.add(x))
    targets = [
        n.target for n in inventory_of(net, torch.randn(4, 4)).parts[0].graph_module.graph.nodes
    ]
    assert torch.sigmoid in targets
    assert torch.matmul in targets
    assert torch.add in targets


def test_layers_as_functions_become_modules_that_share_their_tensors():
    net = NETS["functional"]
    model = net.model()
    graph_module = inventory_of(model, net.batches(1)[0]).parts[0].graph_module
    (convolution, _), layer = filter(None, map(module_of, graph_module.graph.nodes))
    assert (convolution.stride, convolution.padding) == ((2, 2), (1, 1))
    assert convolution.weight is model.conv_weight
    assert convolution.bias is model.conv_bias
    assert layer.weight is model.weight
    assert layer.bias is None


def test_a_product_with_a_matrix_and_a_sum_with_a_vector_become_one_layer(recwarn):
    model = net_of(lambda self, x: x @ self.w + self.b)
    model.w, model.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))
    graph_module = inventory_of(model, torch.randn(2, 4)).parts[0].graph_module
    (layer,) = filter(None, map(module_of, graph_module.graph.nodes))
    assert torch.equal(layer.weight, model.w.t())
    assert layer.bias is model.b
    assert not recwarn.list


def test_a_setting_in_a_list_of_one_is_for_each_dimension():
    model = net_of(lambda self, x: F.conv2d(x, self.w, stride=[2], dilation=(2,), padding="valid"))
    model.w = nn.Parameter(torch.randn(4, 3, 2, 2))
    graph_module = inventory_of(model, torch.randn(1, 3, 8, 8)).parts[0].graph_module
    (convolution,) = filter(None, map(module_of, graph_module.graph.nodes))
    settings = convolution.stride, convolution.dilation, convolution.padding
    assert settings == ((2, 2), (2, 2), (0, 0))


def test_every_node_of_the_fused_graph_that_can_be_decided_has_a_site():
    inventory = inventory_of(Mlp().eval(), torch.randn(2, 6))
    decided = [n.meta["site"] for n in inventory.parts[0].graph_module.graph.nodes if n.op in CALLS]
    assert decided == ["fc1", "fc2"]
