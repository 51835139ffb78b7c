"""What a file or a model is once a runtime has opened it, and the kernels that it reports."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qrecipe.errors.text import counted
from qrecipe.model.call import Inputs
from qrecipe.model.nested import tensors_in


@dataclass(frozen=True, slots=True)
class Kernel:
    """What a runtime runs for some operators of a file, which ``nodes`` names as the file does."""

    operation: str
    is_integer: bool
    nodes: tuple[str, ...]


class Session(Protocol):
    """A file or a model, ready to run."""

    def run(self, inputs: Inputs) -> Any:
        """One call, without gradients.

        Sessions of files take the tensors in order, and return them in a list.
        """

    def kernels(self) -> Sequence[Kernel] | None:
        """What the runtime reports to run besides conversions; None if it reports nothing."""


@dataclass(frozen=True, slots=True)
class ModuleSession:
    """A model, or a package that is called like one, which torch runs."""

    module: Any

    def run(self, inputs: Inputs) -> Any:
        with torch.no_grad():
            return inputs.call(self.module)

    def kernels(self) -> None:
        return None


def arrays(inputs: Inputs) -> list[Any]:
    """The tensors of a call in order, as arrays of NumPy that share their memory."""
    tensors = tensors_in((inputs.args, dict(inputs.kwargs)))
    return [tensor.detach().numpy() for tensor in tensors]


def arrays_for(inputs: Inputs, count: int) -> list[Any]:
    """The `arrays` for a file that takes so many. Raises ``ValueError`` if there are others."""
    given = arrays(inputs)
    if len(given) != count:
        raise ValueError(f"it takes {counted(count, 'tensor')}, not {len(given)}")
    return given


def tensors(found: Iterable[Any]) -> list[Tensor]:
    """Arrays as tensors that share their memory."""
    return [torch.from_numpy(array) for array in found]


def in_integers(kernels: Sequence[Kernel], sites: Collection[str]) -> frozenset[str]:
    """Those of the sites that kernels compute in integers."""
    names = {name for kernel in kernels if kernel.is_integer for name in kernel.nodes}
    return frozenset(site for name in names if (site := _site_of(name, sites)) is not None)


_CONVERSION = "quantizelinear"
"""Conversions are named after what they convert, and are no kernels of it."""


def _site_of(name: str, sites: Collection[str]) -> str | None:
    """Nodes are called ``site/Operator``, and runtimes add ``/MatMulAddFusion`` and the like."""
    if _CONVERSION in name.lower():
        return None
    while name not in sites:
        name, slash, _ = name.rpartition("/")
        if not slash:
            return None
    return name
