"""The recipe's observers in the classes that torchao looks for.

torchao inserts and calibrates observers of torch.ao, and then leaves them in the converted model,
without an error and with float tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qrecipe._torch_ao import FakeQuantizeBase, StandIn, innermost
from qrecipe.execution.fake_quants import not_observing
from qrecipe.execution.pt2e.torchao import ObserverBase, QuantizationSpec
from qrecipe.model.copies import runnable_copy
from qrecipe.model.nodes import module_of, stored
from qrecipe.observers.qconfig import factory
from qrecipe.recipe.schema import Phase, TensorSpec

ACTIVATION = "activation_post_process"
"""Where torch's fake-quants keep their observer, and where checks of ranges look for it."""

WEIGHT = "weight_observer"
"""The observer of a weight sees it once, when the program is converted."""


class Adapter(ObserverBase, StandIn):  # type: ignore[misc]
    """An observer of the recipe, which does all the work."""

    def __init__(self, observer: Any, name: str) -> None:
        super().__init__(observer.dtype, bool(getattr(observer, "is_dynamic", False)))
        self.add_module(name, observer)
        self.observer_name = name
        self.take_settings(observer)
        self.eps = float(getattr(innermost(observer), "eps", torch.finfo(torch.float32).eps))

    @property
    def observer(self) -> Any:
        return getattr(self, self.observer_name)

    def forward(self, x: Tensor) -> Any:
        if self.observer_name == ACTIVATION or isinstance(self.observer, FakeQuantizeBase):
            return self.observer(x)
        return x

    def calculate_qparams(self) -> Any:
        return self.observer.calculate_qparams()


class Follower(ObserverBase, StandIn):  # type: ignore[misc]
    """Stands after an operation that moves the numbers of its input, and shares its observer.

    It does not observe them once more: a moving average would forget faster, and a part of a tensor
    would narrow the range of the whole. In training it rounds.
    """

    def __init__(self, leader: Adapter) -> None:
        super().__init__(leader.dtype, leader.is_dynamic)
        self.leader = leader
        self.take_settings(leader)

    def forward(self, x: Tensor) -> Any:
        observer = self.leader.observer
        if not isinstance(observer, FakeQuantizeBase):
            return x
        with not_observing(observer):
            return observer(x)

    def calculate_qparams(self) -> Any:
        return self.leader.calculate_qparams()


@dataclass(frozen=True, slots=True)
class _Factory:
    """Makes the adapter of a tensor spec, whatever arguments torchao would give it."""

    spec: TensorSpec
    phase: Phase
    name: str
    channels: int
    __name__ = "Adapter"  # torchao reads it

    def with_args(self, **_: Any) -> _Factory:
        return self

    def __call__(self) -> Adapter:
        return Adapter(factory(self.spec, self.phase, self.channels)(), self.name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Factory:
        return self


def quantization_spec(
    spec: TensorSpec, phase: Phase, name: str, channels: int = 1
) -> QuantizationSpec:
    """A tensor spec as torchao wants it in an annotation; ``channels`` are those of a weight."""
    make = _Factory(spec, phase, name, channels)
    made = make()
    is_per_channel = not spec.is_per_tensor
    return QuantizationSpec(
        dtype=made.dtype,
        observer_or_fake_quant_ctr=make,
        quant_min=made.quant_min,
        quant_max=made.quant_max,
        qscheme=made.qscheme,
        ch_axis=made.ch_axis if is_per_channel else None,
        is_dynamic=made.is_dynamic,
    )


def with_weights_observed(prepared: fx.GraphModule) -> fx.GraphModule:
    """A copy whose observers of weights have seen them."""
    made = runnable_copy(prepared)
    for node in made.graph.nodes:
        adapter = adapter_at(node)
        if isinstance(adapter, Adapter) and adapter.observer_name == WEIGHT:
            adapter.observer(stored(node.args[0]))
    return made


AnyAdapter = Adapter | Follower


def adapter_at(node: object) -> AnyAdapter | None:
    """The adapter that a node of a prepared program calls, if it calls one."""
    module = module_of(node) if isinstance(node, fx.Node) else None
    return module if isinstance(module, AnyAdapter) else None
