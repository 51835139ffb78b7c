"""Quantized layers whose weights are packed for another engine than the model's.

torch packs what is copied, unpickled or loaded from a state dict for the current engine, whose
kernel may be wrong or slow. TorchScript does so when a file is loaded, where nothing can be done
about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from qrecipe._torch_fx import LinearPackedParams
from qrecipe.errors.findings import ArtifactError, Finding
from qrecipe.execution.engine import engine
from qrecipe.model.addresses import site_of
from qrecipe.model.nodes import called_modules
from qrecipe.planning.convolution import shape_of
from qrecipe.planning.cpu import has_vnni
from qrecipe.planning.engines import Detour, around_wrong_kernel, is_wrong
from qrecipe.planning.plan import Engine, Plan
from qrecipe.recipe.schema import Backend
from qrecipe.rules.resolution import listed

_ENGINE = "qrecipe_engine"
"""The attribute of what packs a weight, a convolution or the holder in a linear layer."""
_IGNORED = "__jit_ignored_attributes__"


class _PackedLinear(LinearPackedParams):
    """What holds the weight of a linear layer."""

    def set_weight_bias(self, weight: Tensor, bias: Tensor | None) -> None:
        with engine(getattr(self, _ENGINE)):  # not declared: TorchScript would not know the type
            super().set_weight_bias(weight, bias)

    def __setstate__(self, state: Mapping[str, Any]) -> None:  # of a copy, too
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.set_weight_bias(*self._weight_bias())


def _keep_linear_engine(layer: Any, own: Engine) -> None:
    holder = layer._packed_params
    holder.__class__ = _PackedLinear
    setattr(holder, _ENGINE, own)
    if own == "onednn":
        layer.register_forward_hook(_with_all_dimensions)


def _with_all_dimensions(_: nn.Module, inputs: tuple[Tensor, ...], result: Tensor) -> Tensor:
    """The result in the shape of the input: onednn gives an empty one in two dimensions."""
    return result.reshape(*inputs[0].shape[:-1], result.shape[-1])


def _keep_convolution_engine(layer: Any, own: Engine, wrong: Sequence[str]) -> None:
    """Let a convolution stay packed for an engine. Its class stays torch's, which tools look at.

    ``wrong`` are the convolutions of its graph that the usual engine computes wrongly, if it is one
    of them.
    """
    vars(layer)[_ENGINE] = own
    # TorchScript makes a string a field, which the __setstate__ of a convolution leaves unset
    vars(layer)[_IGNORED] = [_ENGINE, _IGNORED]
    vars(layer)["__deepcopy__"] = partial(_copied, layer, own, wrong)
    vars(layer)["_load_from_state_dict"] = partial(_load, layer, own)
    if wrong:  # what jit.trace and jit.script call
        vars(layer)["_slow_forward"] = vars(layer)["__prepare_scriptable__"] = partial(
            _refuse, wrong
        )


def _copied(layer: Any, own: Engine, wrong: Sequence[str], memo: dict[int, Any]) -> Any:
    with engine(own):
        copied = type(layer).__deepcopy__(layer, memo)
    _keep_convolution_engine(copied, own, wrong)
    return copied


def _load(layer: Any, own: Engine, *args: Any) -> None:
    with engine(own):
        type(layer)._load_from_state_dict(layer, *args)


def _refuse(wrong: Sequence[str], *_: Any, **__: Any) -> NoReturn:
    raise ArtifactError(
        Finding(
            "QR512",
            "TorchScript does not store which engine computes a site, and would compute others "
            f"wrongly once it is loaded: {listed(wrong)}",
            hint="store the model with qrecipe.save_quantized, or leave them float",
        )
    )


def keep_engines(
    converted: fx.GraphModule, engines: Mapping[str, Engine], backend: Backend
) -> None:
    """Let the layers at the sites that have an engine of their own stay packed for it, in place."""
    found = {
        site: layer
        for node, layer in called_modules(converted.graph)
        if (site := site_of(node) or "") in engines and hasattr(layer, "_packed_params")
    }
    convolutions = {site: layer for site, layer in found.items() if not is_linear(layer)}
    wrong = [site for site, layer in convolutions.items() if is_wrong(shape_of(layer), backend)]
    for site, layer in found.items():
        if site in convolutions:
            _keep_convolution_engine(layer, engines[site], wrong if site in wrong else ())
        else:
            _keep_linear_engine(layer, engines[site])


def right_engines(converted: fx.GraphModule, plan: Plan) -> dict[str, Engine]:
    """The engines of a stored plan, corrected where its release took a wrong kernel for right."""
    found = plan.engines
    weights = {site.name: site.qconfig.weight for site in plan if site.qconfig is not None}
    for node, layer in called_modules(converted.graph):
        site = site_of(node) or ""
        if site in weights and hasattr(layer, "_packed_params") and hasattr(layer, "kernel_size"):
            own = found.get(site, plan.backend)
            other = around_wrong_kernel(shape_of(layer), own, weights[site])
            if isinstance(other, Detour):
                found[site] = other.engine
    return found


def pack_linear(layer: Any, own: Engine) -> None:
    """Pack a quantized linear layer for an engine, in place, now or when its weight comes."""
    _keep_linear_engine(layer, own)
    if isinstance(layer._packed_params._packed_params, torch.ScriptObject):
        layer.set_weight_bias(*layer._weight_bias())


def is_linear(layer: nn.Module) -> bool:
    """Whether it is a quantized linear layer."""
    return isinstance(getattr(layer, "_packed_params", None), LinearPackedParams)


def own_engines(converted: nn.Module) -> dict[nn.Module, Engine]:
    """What holds packed weights with an engine of their own."""
    holders = [each for each in converted.modules() if _ENGINE in vars(each)]
    return {holder: vars(holder)[_ENGINE] for holder in holders}


_LARGE = 1 << 19
"""The weights of a convolution that takes so long that the rest hardly matters."""


def forget_calls(converted: nn.Module, plan: Plan) -> None:
    """Pack convolutions for onednn again, in place, so that the caller's first call is the first.

    Their packed weights keep the kernel for the shape of the first input. For every other shape
    the kernel is prepared again in each call, which takes some 35 microseconds.
    """
    for layer, site in _convolutions(converted):
        own = plan.engines.get(site, plan.backend)
        # x86 uses it where the CPU has VNNI, for most shapes
        if own == "onednn" or (own == "x86" and has_vnni()):
            weight, bias = layer._weight_bias()
            if weight.numel() <= _LARGE:
                with engine(own):
                    layer.set_weight_bias(weight, bias)


def _convolutions(converted: nn.Module) -> Iterator[tuple[Any, str]]:
    """The convolutions of all graphs in a model, and their sites."""
    for module in converted.modules():
        if isinstance(module, fx.GraphModule):
            for node, layer in called_modules(module.graph):
                site = site_of(node)
                packed = getattr(layer, "_packed_params", None)
                if site is not None and isinstance(packed, torch.ScriptObject):
                    yield layer, site
