"""Changes to a graph for quantization-aware training."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx, nn

from qrecipe._torch_fx import BackendConfig, backend_config_utils
from qrecipe.model.normalize import free_name
from qrecipe.model.switches import DROPOUTS, arguments


def make_dropouts_switchable(graph_module: fx.GraphModule, switched: Collection[str]) -> None:
    """Turn dropout functions into modules that follow ``train()`` and ``eval()``, in place.

    ``switched`` are the names of the nodes that drop in training mode; tracing recorded their
    ``training=self.training`` as False.
    """
    for node in graph_module.graph.nodes:
        if node.target not in DROPOUTS or node.name not in switched:
            continue
        given = arguments(node)
        path = free_name(graph_module, node.name)
        graph_module.add_submodule(path, DROPOUTS[node.target](given["p"]))
        node.op, node.target = "call_module", path
        node.args, node.kwargs = (given["input"],), {}
    graph_module.recompile()


def modules_as_trained(
    modules: Mapping[str, nn.Module], backend_config: BackendConfig
) -> dict[str, nn.Module]:
    """The modules by path, with the types that torch swaps in before it matches patterns.

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
