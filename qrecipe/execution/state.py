"""All state of a converted model as named plain tensors, and back.

State is what module attributes hold: parameters, buffers, other tensors, torch's packed weights,
and the output scales and zero points that some quantized modules keep as numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qrecipe.execution.packing import Unpacked, unpacked
from qrecipe.model.graph_names import outer
from qrecipe.rules.structure import joined

_NUMBERS = ("scale", "zero_point", "output_scale", "output_zero_point")
_WRAPPERS = ("_packed_params", "_packed_weight")
"""Attributes on the way to a packed weight, left out of the names in the file."""

Kind = Literal["tensor", "packed", "number"]


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
            found = value.tensors() if isinstance(value, Unpacked) else unpacked(value)
            return {f"{self.name}.{role}": tensor for role, tensor in found.items()}
        if self.kind == "number":
            dtype = torch.float64 if isinstance(value, float) else torch.int64
            return {self.name: torch.tensor(value, dtype=dtype)}
        return {self.name: value.detach()}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace its tensors by others with the same names, dtypes and shapes."""
        value: Any
        if self.kind == "packed":
            roles = {name.removeprefix(f"{self.name}."): each for name, each in tensors.items()}
            value = self.value.packed(roles)
        elif self.kind == "number":
            value = tensors[self.name].item()
        else:
            value = tensors[self.name]
        setattr(self.module, self.attribute, value)

    def like(self, tensor: Tensor) -> Tensor:
        """The tensor as a parameter, if the present one is."""
        now = self.value
        return nn.Parameter(tensor, now.requires_grad) if isinstance(now, nn.Parameter) else tensor

    @property
    def is_kernels(self) -> bool:
        """Whether a quantized kernel reads it."""
        return self.kind != "tensor" or _is_quantized(self.module)


def slots_of(model: nn.Module) -> list[Slot]:
    """Every module attribute that holds state; shared modules once."""
    return [slot for path, module in model.named_modules() for slot in _slots(path, module)]


def _slots(path: str, module: nn.Module) -> Iterator[Slot]:
    attributes = {**vars(module), **module._parameters, **module._buffers}
    for attribute, value in attributes.items():
        name = outer(joined(path, attribute))
        if isinstance(value, (torch.ScriptObject, Unpacked)):
            short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
            yield Slot(short, "packed", module, attribute)
        elif isinstance(value, Tensor):
            yield Slot(name, "tensor", module, attribute)
        elif attribute in _NUMBERS and isinstance(value, (int, float)) and _is_quantized(module):
            yield Slot(name, "number", module, attribute)


def _is_quantized(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.nn.")
