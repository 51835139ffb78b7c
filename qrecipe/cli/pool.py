"""``--pool``: the command's own processes, or the workers of a Dask scheduler."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process, util
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qrecipe
from qrecipe.cli.model_argument import load_subject
from qrecipe.cli.user_code import UserCode
from qrecipe.errors.findings import ExecutionError, QRecipeError
from qrecipe.errors.text import first_line

_SECONDS = 10
"""How long a scheduler may take to answer."""


@contextmanager
def workers_of(text: str | None, model: str, threads: int | None) -> Iterator[qrecipe.Pool | None]:
    """The pool that ``text`` names, or None; one thread each unless ``threads`` says otherwise.

    A worker makes a model that cannot be pickled by the function that ``--model`` names.
    """
    if text is None:
        yield None
        return
    kind, _, value = text.partition(":")
    if threads is None:
        torch.set_num_threads(1)
    factory = partial(_made, _anywhere(model))
    if kind == "processes":
        yield qrecipe.Pool(partial(Processes, int(value)), factory)
        return
    with _client(value) as client:
        yield qrecipe.Pool(client.get_executor(), factory)


class Processes(ProcessPoolExecutor):
    """Processes that end at once, and when this one does, and leave Ctrl-C to it."""

    def __init__(self, count: int) -> None:
        super().__init__(count, mp_context=get_context("spawn"), initializer=_begin)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        # new processes have the mask of this thread
        former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(fn, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if self._pending_work_items:  # nobody waits for what runs
            for process in list((self._processes or {}).values()):
                process.terminate()
        super().shutdown(wait=True, cancel_futures=True)


def _begin() -> None:
    """Set a new process up."""
    signal.signal(signal.SIGTERM, _stop)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the user's code prints
    threading.Thread(target=_follow, daemon=True).start()


def _stop(*_: Any) -> None:
    """End at once, but give back locks that are shared with other processes."""
    util._exit_function()  # type: ignore[attr-defined]
    os._exit(1)


def _follow() -> None:
    """End when the parent does, even if it was killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _client(address: str) -> Iterator[Any]:
    """A client of a Dask scheduler. Raises ``QRecipeError`` (QR602, QR428) where there is none."""
    try:
        import distributed
    except ImportError as error:
        text = "--pool dask:ADDRESS needs Dask: pip install 'qrecipe[pool]'"
        raise QRecipeError.of("QR602", text) from error
    try:
        dask: Any = distributed  # most of it is not typed
        client = dask.Client(address, timeout=_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        text = f"no Dask scheduler answers at {address}: {first_line(error)}"
        hint = "start one with `dask scheduler`, and workers with `dask worker ADDRESS`"
        raise ExecutionError.of("QR428", text, hint=hint) from error
    with client:
        if not client.nthreads():
            text = f"the Dask scheduler at {address} has no workers"
            hint = f"start some: dask worker {address} --nthreads 1"
            raise ExecutionError.of("QR428", text, hint=hint)
        yield client


def _anywhere(name: str) -> str:
    """The name of a function, with its file named so that it is found from any folder."""
    file, colon, attribute = name.rpartition(":")
    is_file = file.endswith(".py") or "/" in file or os.sep in file
    return f"{Path(file).resolve()}{colon}{attribute}" if is_file else name


def _made(name: str) -> nn.Module:
    return load_subject(UserCode(), name).model
