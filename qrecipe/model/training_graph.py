"""What torch swaps in for quantization-aware training."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from qrecipe._torch_fx import BackendConfig, backend_config_utils


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
