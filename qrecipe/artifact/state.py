"""All state of a converted model as named plain tensors, and back.

State is what module attributes hold: parameters, buffers, other tensors, torch's packed weights,
and the output scales and zero points that some quantized modules keep as numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from qrecipe.execution.packing import repacked, unpacked
from qrecipe.model.graph_names import outer
from qrecipe.model.normalize import stored
from qrecipe.rules.structure import joined

_NUMBERS = ("scale", "zero_point", "output_scale", "output_zero_point")
_WRAPPERS = ("_packed_params", "_packed_weight")
"""Attributes on the way to a packed weight, left out of the names in the file."""

Kind = Literal["tensor", "packed", "number"]
Role = Literal["scale", "zero point", "operand"]
"""What a kernel reads besides its input: an operand is a weight or a bias."""

_ROLES: dict[str, Role] = {"scale": "scale", "zero_point": "zero point"}
_ROLE = re.compile(r"(?:^|[._])(scale|zero_point)$")


@dataclass(frozen=True, slots=True)
class Slot:
    """A module attribute that holds state; its tensors are named after ``name``."""

    name: str
    kind: Kind
    module: nn.Module
    attribute: str

    @property
    def value(self) -> Any:
        return getattr(self.module, self.attribute)

    def tensors(self) -> dict[str, Tensor]:
        """Its state as plain tensors by their names in a file; scalars have no dimensions."""
        value = self.value
        if self.kind == "packed":
            return {f"{self.name}.{role}": tensor for role, tensor in unpacked(value).items()}
        if self.kind == "number":
            dtype = torch.float64 if isinstance(value, float) else torch.int64
            return {self.name: torch.tensor(value, dtype=dtype)}
        return {self.name: value.detach()}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace its tensors by others with the same names, dtypes and shapes."""
        if self.kind == "packed":
            own = {name.removeprefix(f"{self.name}."): tensors[name] for name in self.tensors()}
            setattr(self.module, self.attribute, repacked(self.value, own))
        elif self.kind == "number":
            setattr(self.module, self.attribute, tensors[self.name].item())
        else:
            setattr(self.module, self.attribute, tensors[self.name])

    def roles(self) -> dict[str, Role]:
        """The role of each of its tensors in a torch kernel, by name; none in other modules."""
        if self.kind == "tensor" and not _is_quantized(self.module):
            return {}
        found = {name: _ROLE.search(name) for name in self.tensors()}
        return {name: _ROLES[match[1]] if match else "operand" for name, match in found.items()}


def slots_of(model: nn.Module) -> list[Slot]:
    """Every module attribute that holds state; shared modules once."""
    return [slot for path, module in model.named_modules() for slot in _slots(path, module)]


def _slots(path: str, module: nn.Module) -> Iterator[Slot]:
    attributes = {**vars(module), **module._parameters, **module._buffers}
    for attribute, value in attributes.items():
        if isinstance(value, torch.ScriptObject):
            yield Slot(_packed_name(path, attribute), "packed", module, attribute)
        elif isinstance(value, Tensor):
            yield Slot(outer(joined(path, attribute)), "tensor", module, attribute)
        elif attribute in _NUMBERS and _is_number(value) and _is_quantized(module):
            yield Slot(outer(joined(path, attribute)), "number", module, attribute)


def _packed_name(path: str, attribute: str) -> str:
    parts = [part for part in outer(joined(path, attribute)).split(".") if part not in _WRAPPERS]
    return ".".join(parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _is_quantized(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.nn.")


def roles_of(model: nn.Module, slots: Sequence[Slot]) -> dict[str, Role]:
    """The state that kernels read, by name, including scales and zero points in graphs."""
    found = {name: role for slot in slots for name, role in slot.roles().items()}
    for path, module in model.named_modules():
        if isinstance(module, fx.GraphModule):
            found |= {outer(joined(path, name)): role for name, role in _graph_roles(module)}
    return found


def _graph_roles(graph_module: fx.GraphModule) -> Iterator[tuple[str, Role]]:
    """The stored scalars that quantizing calls read: floating ones are scales."""
    for node in graph_module.graph.nodes:
        if not (node.target is torch.quantize_per_tensor or str(node.target)[:10] == "quantized."):
            continue
        for source in node.all_input_nodes:
            value = stored(source, graph_module)
            if isinstance(value, Tensor) and value.numel() == 1:
                yield str(source.target), "scale" if value.is_floating_point() else "zero point"
