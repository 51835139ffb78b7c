"""ExecuTorch, with the kernels of XNNPACK."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from qrecipe._torch_ao import quiet
from qrecipe.errors.findings import QRecipeError
from qrecipe.model.call import Inputs
from qrecipe.process.state import unheard
from qrecipe.process.warnings import held_back

INSTALL = "pip install --no-deps executorch==1.5.1 flatbuffers ruamel.yaml tabulate"

MODULES = (
    "executorch.exir",
    "executorch.backends.xnnpack.partition.xnnpack_partitioner",
    "executorch.runtime",
)
_THREADS = "executorch.extension.pybindings.portable_lib"


@dataclass(frozen=True, slots=True)
class ExecuTorchSession:
    """A method of a program, which has to stay alive; it takes inputs of the exported sizes."""

    method: Any
    program: Any

    def run(self, inputs: Inputs) -> list[Tensor]:
        leaves = pytree.tree_leaves((inputs.args, dict(inputs.kwargs)))
        return list(self.method.execute(leaves))

    def kernels(self) -> None:
        return None


def open_file(source: Path | bytes, threads: int) -> ExecuTorchSession:
    """A ``.pte`` file, or its content; the threads are the process's, see `limited`.

    Results are in memory of the runtime, which the next run overwrites.
    """
    program = import_module(MODULES[2]).Runtime.get().load_program(source)
    return ExecuTorchSession(program.load_method("forward"), program)


def lowered(exported: Any, constants: Mapping[str, str] | None = None) -> Any:
    """torch's exported program in the operators of ExecuTorch, as XNNPACK takes them."""
    exir, xnnpack, _ = map(import_module, MODULES)
    partitioner = [xnnpack.XnnpackPartitioner()]
    return exir.to_edge_transform_and_lower(
        exported, partitioner=partitioner, constant_methods=constants
    )


@contextmanager
def limited(threads: int) -> Iterator[None]:
    """Let ExecuTorch have so many threads in this process."""
    library = import_module(_THREADS)
    former = library._threadpool_get_thread_count()
    library._unsafe_reset_threadpool(threads)
    try:
        yield
    finally:
        library._unsafe_reset_threadpool(former)


def check_installed() -> None:
    """Raises ``QRecipeError`` (QR602) if ExecuTorch, or what it imports, is missing."""
    handlers = list(logging.root.handlers)
    try:
        with unheard(), quiet(), held_back([("", Warning)]):
            for name in MODULES:
                import_module(name)
    except ImportError as error:
        raise QRecipeError.of("QR602", f"ExecuTorch needs {error.name}: {INSTALL}") from None
    finally:
        logging.root.handlers[:] = handlers  # it sets up the logging of the whole process
