"""What torch computes with in this process, and what to time with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch have so many threads inside the ``with``."""
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(former)


@dataclass(frozen=True, slots=True)
class TorchSettings:
    """What the last bits of float results depend on besides torch's version and the CPU."""

    threads: int
    onednn: bool
    matmul_precision: str

    @classmethod
    def here(cls) -> TorchSettings:
        """Those of this process."""
        return cls(
            torch.get_num_threads(),
            bool(torch.backends.mkldnn.enabled),
            torch.get_float32_matmul_precision(),
        )

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let torch compute with these inside the ``with``."""
        former = TorchSettings.here()
        self._set()
        try:
            yield
        finally:
            former._set()

    def _set(self) -> None:
        torch.set_num_threads(self.threads)
        torch.backends.mkldnn.enabled = self.onednn  # type: ignore[assignment]
        torch.set_float32_matmul_precision(self.matmul_precision)

    @property
    def words(self) -> dict[str, str]:
        """Each by what it is called."""
        return {
            "threads": str(self.threads),
            "oneDNN": "on" if self.onednn else "off",
            "float32 matmul precision": self.matmul_precision,
        }


def clock() -> Callable[[], float]:
    """What to time calls of models with, in seconds.

    With several threads it is wall time. With one it is the CPU time of this thread, which does not
    contain what other programs on the machine take in between.
    """
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
