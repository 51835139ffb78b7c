"""torch's Inductor: models that are compiled by ``torch.compile``, which is slow to import."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qrecipe.errors.findings import QRecipeError
from qrecipe.runtimes.session import ModuleSession

KERNELS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "qconv_weight_prepack_matcher_count": ("convolution", ("aten.conv1d.", "aten.conv2d.")),
    "qlinear_weight_prepack_matcher_count": ("linear layer", ("aten.linear.",)),
}
"""torch's counter of what became an integer kernel, and the operators that can."""


class Compiled(nn.Module):
    """A model that is compiled for the sizes of its inputs when they first occur."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._compiled = torch.compile(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with frozen():
            return self._compiled(*args, **kwargs)


def opened(source: nn.Module | Path, threads: int) -> ModuleSession:
    """A model, to be compiled when it first runs, or a package of AOTInductor."""
    if isinstance(source, Path):
        return ModuleSession(torch._inductor.aoti_load_package(str(source)))
    return ModuleSession(Compiled(source))


@contextmanager
def frozen() -> Iterator[None]:
    """Let torch's compiler take weights for constants, or it makes no integer kernels."""
    from torch._inductor import config

    with torch.no_grad(), config.patch(freezing=True):
        yield


@contextmanager
def counted_kernels() -> Iterator[Counter[str]]:
    """Filled at the end: the integer kernels that torch's compiler made, by its counters."""
    from torch._dynamo.utils import counters

    found, before = Counter[str](), Counter(counters["inductor"])
    yield found
    found.update(Counter(counters["inductor"]) - before)


def check_compiler() -> None:
    """Raises ``QRecipeError`` (QR602) without a C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        text = f"torch's compiler needs a C++ compiler, and there is no {compiler}"
        raise QRecipeError.of("QR602", text, hint="apt-get install g++, or set CXX to another one")
