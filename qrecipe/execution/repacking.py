"""The packed weights of converted models, packed again: for the engines of the plan.

torch packs weights that are copied or loaded for the current engine, whose kernel may be wrong or
slow. TorchScript does the same when a file is loaded, where nothing can be done about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from torch import fx, nn

from qrecipe.errors.findings import ArtifactError, Finding
from qrecipe.execution.packing import pack_again, packed_in, packed_sites
from qrecipe.planning.convolution import shape_of
from qrecipe.planning.cpu import has_vnni
from qrecipe.planning.engines import is_wrong
from qrecipe.planning.plan import Engine, Plan
from qrecipe.recipe.schema import Backend
from qrecipe.rules.resolution import listed

_ENGINES = "qrecipe_engines"
"""The engines of sites in the ``meta`` of a graph module, which its copies keep."""

_WRONG = "qrecipe_wrong"
"""Likewise the sites that the backend's own engine computes wrongly."""

_LOADED = "qrecipe_loaded"
"""Likewise their weights in a state dict, while it is loaded."""


def keep_engines(converted: nn.Module, plan: Plan) -> None:
    """Let copies of the model, and what is loaded into it, run on the engines of their sites."""
    if not plan.engines:
        return
    for module in converted.modules():
        if isinstance(module, fx.GraphModule):
            module.meta[_ENGINES] = plan.engines
            module.meta[_WRONG] = list(_wrong_sites(module, plan.backend))
            module.register_load_state_dict_pre_hook(_note_weights)  # type: ignore[no-untyped-call]
            module.register_load_state_dict_post_hook(_pack_loaded)  # type: ignore[no-untyped-call]
            _watch(module)


def _watch(graph_module: fx.GraphModule) -> None:
    # each graph module has a class of its own
    own: Any = type(graph_module)
    own.__deepcopy__ = _copied
    if graph_module.meta[_WRONG]:
        own._slow_forward = own.__prepare_scriptable__ = _refuse  # what jit.trace and script call


def _copied(self: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
    copied = fx.GraphModule.__deepcopy__(self, memo)
    for (source, _), (target, own) in zip(packed_sites(self), _detoured(copied), strict=True):
        packed = source._packed_params
        if own is not None and target._packed_params is not packed:
            pack_again(target, own, packed.unpack()[0])
    _watch(copied)
    return copied


def _note_weights(
    self: fx.GraphModule, state_dict: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    paths = {module: path for path, module in self.named_modules()}
    self.meta[_LOADED] = {
        layer: state_dict.get(f"{prefix}{paths[layer]}.weight") for layer, _ in _detoured(self)
    }


def _pack_loaded(self: fx.GraphModule, _: Any) -> None:
    weights = self.meta.pop(_LOADED)
    for layer, own in _detoured(self):
        if own is not None and weights[layer] is not None:
            pack_again(layer, own, weights[layer])


def _detoured(graph_module: fx.GraphModule) -> Iterator[tuple[Any, Engine | None]]:
    """The convolutions, each with the engine that it is packed for if not the model's."""
    for layer, site in packed_sites(graph_module):
        yield layer, graph_module.meta[_ENGINES].get(site)


def _wrong_sites(graph_module: fx.GraphModule, backend: Backend) -> Iterator[str]:
    for layer, site in packed_sites(graph_module):
        is_elsewhere = site in graph_module.meta[_ENGINES]
        if is_elsewhere and is_wrong(shape_of(layer), backend):
            yield site


def _refuse(self: fx.GraphModule, *_: Any, **__: Any) -> NoReturn:
    raise ArtifactError(
        Finding(
            "QR512",
            "TorchScript does not store which engine computes a site, and would compute others "
            f"wrongly once it is loaded: {listed(self.meta[_WRONG])}",
            hint="store the model with qrecipe.save_quantized, or leave them float",
        )
    )


_LARGE = 1 << 19
"""The weights of a convolution that takes so long that the rest hardly matters."""


def forget_calls(converted: nn.Module, plan: Plan) -> None:
    """Pack convolutions for onednn again, in place, so that the caller's first call is the first.

    Their packed weights keep the kernel for the shape of the first input. For every other shape
    the kernel is prepared again in each call, which takes some 35 microseconds.
    """
    for layer, site in packed_in(converted):
        own = plan.engines.get(site, plan.backend)
        # x86 uses it where the CPU has VNNI, for most shapes
        if own == "onednn" or (own == "x86" and has_vnni()):
            weight, _ = layer._packed_params.unpack()
            if weight.numel() <= _LARGE:
                pack_again(layer, own, weight)
