"""The modules whose tensors a transform may change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from qrecipe.model.graph_sites import Inventory
from qrecipe.model.nodes import stored
from qrecipe.model.scaled_input import ScaledLinear

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMS = (nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or linear layer of the model, and the BatchNorm that follows it."""

    path: str
    norm: str | None


class Changeable:
    """Which modules of the caller's model a transform may change."""

    def __init__(self, inventory: Inventory) -> None:
        model = inventory.model
        self._model = model
        self._opened = inventory.opened
        named = dict(model.named_parameters(remove_duplicate=False))
        self._tensors = Counter(map(id, named.values()))
        self._calls = Counter(
            member.module
            for match in inventory.matches.values()
            for member in match.operation.members
        )
        self._read = set(map(id, _stored_tensors(inventory)))

    def obstacle(self, layer: Layer) -> str | None:
        """Why the tensors of a layer cannot be changed, None if they can."""
        for path in filter(None, (layer.path, layer.norm)):
            if self.is_opened(path):
                return f"{path} is part of a layer that is opened"
            why = self.why_not(path)
            if why is not None:
                return f"{path} {why}"
        return None

    def is_opened(self, path: str) -> bool:
        """Whether a module only exists, as such, in the opened model; its tensors always do."""
        return any(path == each or path.startswith(f"{each}.") for each in self._opened)

    def why_not(self, path: str) -> str | None:
        """Why the tensors of a module cannot be changed, to follow its name; None if they can."""
        module = self._model.get_submodule(path)
        if type(module) not in (*LAYERS, *BATCH_NORMS, *NORMS, ScaledLinear):
            return f"is a {type(module).__name__}, which may compute something else"
        own = module._parameters
        if own.get("weight") is None or module._forward_pre_hooks or module._forward_hooks:
            return "computes its weight, or has none"
        if self._calls[path] > 1:
            return "is called several times"
        tensors = [tensor for tensor in own.values() if tensor is not None]
        if any(self._tensors[id(tensor)] > 1 or id(tensor) in self._read for tensor in tensors):
            return "shares its weight"
        if isinstance(module, BATCH_NORMS) and module.running_var is None:
            return "has no statistics"
        return None


def _stored_tensors(inventory: Inventory) -> Iterator[Any]:
    """What graphs read directly, and not through a module of the model."""
    for match in inventory.matches.values():
        if match.module is not match.layer and match.module is not None:  # a function
            yield from match.module.parameters()
    for part in inventory.parts:
        for node in part.graph_module.graph.find_nodes(op="get_attr"):
            yield stored(node)
