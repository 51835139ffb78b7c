"""Results that only clamps read are observed as the clamps give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from qrecipe._torch_ao import FakeQuantizeBase, ObserverBase, StandIn, is_observer
from qrecipe.execution.clamped import Clamping
from qrecipe.model.addresses import site_of
from qrecipe.planning.plan import Limits

_SETTINGS = ("qscheme", "quant_min", "quant_max", "ch_axis", "eps")


class Clamped(ObserverBase, StandIn, Clamping):
    """Shows an observer what is left of a tensor between limits, and returns the whole.

    A fake-quant rounds what is left: nobody reads more of it, and no gradient comes from there.
    """

    def __init__(self, observer: Any, limits: Limits) -> None:
        super().__init__(observer.dtype, bool(getattr(observer, "is_dynamic", False)))
        self.activation_post_process = observer
        self.limits = limits
        for setting in _SETTINGS:
            if hasattr(observer, setting):
                setattr(self, setting, getattr(observer, setting))

    def forward(self, x: Tensor) -> Any:
        observed = self.activation_post_process(x.clamp(*self.limits))
        return observed if isinstance(self.activation_post_process, FakeQuantizeBase) else x

    def calculate_qparams(self, **_: Any) -> Any:
        return self.activation_post_process.calculate_qparams()


def observe_clamped(prepared: fx.GraphModule, clamps: Mapping[str, Limits]) -> None:
    """Let the observers of some sites' results see them between limits, in place."""
    for node in prepared.graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        limits = clamps.get(site_of(source) or "") if isinstance(source, fx.Node) else None
        if limits is None:
            continue
        observer = prepared.get_submodule(str(node.target))
        if is_observer(observer):
            prepared.set_submodule(str(node.target), Clamped(observer, limits))
