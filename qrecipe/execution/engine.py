"""torch's quantized engines: which are available, and selecting one temporarily."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from qrecipe.errors.findings import UnsupportedError
from qrecipe.errors.spelling import nearest
from qrecipe.planning.plan import Plan
from qrecipe.recipe.schema import Backend

ENGINES = ("x86", "fbgemm", "onednn", "qnnpack")
_ENGINE = threading.RLock()


def available_engines() -> tuple[str, ...]:
    """The engines that this torch has on this CPU."""
    return tuple(name for name in torch.backends.quantized.supported_engines if name != "none")


def check_engine(backend: Backend) -> None:
    """Raise ``UnsupportedError`` (QR309) if this build or CPU lacks the backend's engine."""
    available = available_engines()
    if backend in available:
        return
    names = ", ".join(available)
    text = f"this torch has no engine {backend}; it has {names}"
    near = nearest(backend, available)
    hint = f'did you mean "{near[0]}"?' if near else None
    if backend not in ENGINES:
        text = f"{backend} has no kernels in torch: its models are exported, not executed"
        hint = f"to run the model here, choose one of {names}"
    raise UnsupportedError.of("QR309", text, hint=hint)


def engine_of(plan: Plan) -> AbstractContextManager[None]:
    """The engine of a plan's kernels; none where the converted model computes in float."""
    return nullcontext() if plan.is_for_export else engine(plan.backend)


@contextmanager
def engine(backend: Backend) -> Iterator[None]:
    """Run with the backend's quantized engine, and restore the previous one.

    The engine is global to the process, so other threads wait until this one is done. Raises
    ``UnsupportedError`` (QR309) as `check_engine` does.
    """
    check_engine(backend)
    with _ENGINE:
        former = torch.backends.quantized.engine
        torch.backends.quantized.engine = backend
        try:
            yield
        finally:
            torch.backends.quantized.engine = former
