"""The number of threads that torch computes with, which is the process's, and what to time with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


def clock() -> Callable[[], float]:
    """What to time calls of models with, in seconds.

    With several threads it is wall time. With one it is the CPU time of this thread, which does not
    contain what other programs on the machine take in between.
    """
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
