"""What a transform is, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from qrecipe.execution.calls import Feed
from qrecipe.model.graph_sites import Inventory
from qrecipe.planning.plan import Chain, Group, Plan
from qrecipe.transforms.record import Spread


@dataclass(frozen=True, slots=True, eq=False)
class TransformContext:
    """What a transform can use: the ``plan`` of the model, and the calibration data.

    In a process group, each rank has its own batches; all ranks must come to the same result.
    """

    plan: Plan
    _inventory: Inventory = field(repr=False)
    _feed: Feed = field(repr=False)

    def run(self, model: nn.Module) -> None:
        """Call the model, or a copy with hooks, with each calibration batch, without gradients."""
        for _ in self._feed.runs(model, "transforming"):
            pass


@dataclass(frozen=True, slots=True)
class Scaled:
    """What one of our own transforms has scaled."""

    chains: tuple[Chain, ...] = ()
    groups: tuple[Group, ...] = ()
    spreads: tuple[Spread, ...] = ()


class Transform:
    """A step before quantization that does not change what the float model computes; the base of
    plugins.

    ``tolerance`` is how far it may change an output, relative to the largest one: 0, the default,
    means not even the last bit. `qrecipe.register_transform` gives it a name for recipes.
    """

    tolerance: float = 0.0

    def apply(self, model: nn.Module, context: TransformContext) -> object:
        """Change the tensors of a model in place; it is a copy of the caller's, in eval mode.

        Modules, and the names, shapes and dtypes of tensors, must not change. A plugin returns
        nothing.
        """
        raise NotImplementedError
