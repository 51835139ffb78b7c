"""torch's matching of graphs with the patterns of a backend: the same result, found sooner."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import fx, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from qrecipe._torch_fx import (
    BackendConfig,
    _get_fusion_pattern_to_fuse_handler_cls,
    _get_pattern_to_quantize_handlers,
    _sorted_patterns_dict,
    backend_config_utils,
    find_fusions,
    find_quantizable,
)

dtype_configs = lru_cache(maxsize=16)(backend_config_utils.get_pattern_to_dtype_configs)
"""What the kernels of each pattern take."""

root_getters = lru_cache(maxsize=16)(backend_config_utils.get_fusion_pattern_to_root_node_getter)
"""Which node of what a pattern matches is its root, for the patterns that say so."""


@lru_cache(maxsize=16)
def quantize_handlers(backend_config: BackendConfig) -> dict[Any, Any]:
    """The classes that torch makes of the patterns: some 200, which takes longer than matching."""
    return _get_pattern_to_quantize_handlers(backend_config)


@lru_cache(maxsize=16)
def _fuse_handlers(backend_config: BackendConfig) -> dict[Any, Any]:
    return _sorted_patterns_dict(_get_fusion_pattern_to_fuse_handler_cls(backend_config))


def fusions_in(graph_module: fx.GraphModule, backend_config: BackendConfig) -> dict[str, Any]:
    """What torch will fuse: by the name of each node, the match that it belongs to."""
    graph, modules = graph_module.graph, dict(graph_module.named_modules(remove_duplicate=False))
    patterns = _possible(_fuse_handlers(backend_config), graph, modules)
    return find_fusions(graph_module, graph, patterns)


def quantizable_in(
    graph: fx.Graph, modules: dict[str, nn.Module], patterns: Mapping[Any, Any], *options: Any
) -> dict[str, Any]:
    """torch's matches for quantization, given its arguments."""
    return find_quantizable(graph, modules, _possible(patterns, graph, modules), *options)


def _possible(
    patterns: Mapping[Any, Any], graph: fx.Graph, modules: Mapping[str, nn.Module]
) -> dict[Any, Any]:
    """The patterns whose last operation is in the graph; torch would try all at each node."""
    called = {
        type_before_parametrizations(modules[str(node.target)])
        if node.op == "call_module"
        else node.target
        for node in graph.nodes
    }
    return {
        pattern: handler
        for pattern, handler in patterns.items()
        if (pattern[0] if isinstance(pattern, tuple) else pattern) in called
    }


def modules_as_trained(
    modules: Mapping[str, nn.Module], backend_config: BackendConfig
) -> dict[str, nn.Module]:
    """The modules by path, with the types that torch swaps in for training before it matches.

    Only the type matters, so empty modules are used for the swapped ones.
    """
    swaps = backend_config_utils.get_module_to_qat_module(backend_config)
    return {
        path: _empty(swaps[type(module)]) if type(module) in swaps else module
        for path, module in modules.items()
    }


def _empty(kind: type[nn.Module]) -> nn.Module:
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    return module
