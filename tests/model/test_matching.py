"""Matching with fewer patterns, against torch's own with all of them."""

from __future__ import annotations

from nets import NETS
from runs import STATIC
from torch import fx, nn

from qrecipe._torch_fx import (
    _get_fusion_pattern_to_fuse_handler_cls,
    _sorted_patterns_dict,
    find_fusions,
    find_quantizable,
)
from qrecipe.model import matching
from qrecipe.model.call import Inputs
from qrecipe.planning.backend import own_backend_config
from qrecipe.planning.inventory import inventory_of

CONFIG = own_backend_config("x86")


def test_it_finds_the_operations_that_torch_finds():
    for net in NETS.values():
        model, batch = net.model(), net.batches(1)[0]
        (part,) = inventory_of(model, STATIC, Inputs.from_batch(batch)).parts
        graph, modules = part.graph_module.graph, dict(part.graph_module.named_modules())
        given = matching.quantize_handlers(CONFIG), matching.root_getters(CONFIG)
        expected = find_quantizable(graph, modules, *given)
        found = matching.quantizable_in(graph, modules, *given)
        assert found.keys() == expected.keys()
        for name, (last, nodes, pattern, handler) in expected.items():
            assert found[name][:3] == (last, nodes, pattern)
            assert type(found[name][3]) is type(handler)


def test_it_finds_the_fusions_that_torch_finds():
    model = nn.Sequential(
        *(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 3, 1)),
        *(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2)),
    )
    traced = fx.symbolic_trace(model.eval())
    patterns = _sorted_patterns_dict(_get_fusion_pattern_to_fuse_handler_cls(CONFIG))
    expected = find_fusions(traced, traced.graph, patterns)
    found = matching.fusions_in(traced, CONFIG)
    assert len(found) == 7
    assert {name: match[:2] for name, match in found.items()} == {
        name: match[:2] for name, match in expected.items()
    }
