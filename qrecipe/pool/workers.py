"""The caller's workers: an executor, or a function that makes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from qrecipe.errors.findings import ExecutionError
from qrecipe.errors.short import ShortRepr
from qrecipe.errors.text import shown

Factory = Callable[[], nn.Module]
"""Makes the model again, with tensors of the same names and shapes."""

_FEW = 2
"""How many workers an executor is taken to have that does not say."""


@dataclass(frozen=True, slots=True, repr=False)
class Pool(ShortRepr):
    """Workers for `sensitivity`, `tune` and `compare`, with what a plain executor cannot say.

    Args:
        executor: any ``concurrent.futures.Executor``, or a function that makes one. One that was
            made is shut down at the end, and made anew if its workers die.
        factory: makes the model in each worker, if the model cannot be pickled. The tensors of the
            caller's model are copied into what it returns.
        workers: how many candidates `tune` tries at once; default: what the executor says.
    """

    executor: Executor | Callable[[], Executor]
    factory: Factory | None = None
    workers: int | None = None


class Workers(Executor):
    """The executor of a pool, which may be replaced by a new one."""

    def __init__(self, pool: Pool) -> None:
        given = pool.executor
        self.factory = pool.factory
        self._make = None if isinstance(given, Executor) else given
        self._executor = given if isinstance(given, Executor) else _made(given)
        _check_processes(self._executor)
        self.count = pool.workers or _count(self._executor)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._executor.submit(fn, *args, **kwargs)

    def renew(self) -> bool:
        """Make the executor anew; whether that can be done."""
        if self._make is None:
            return False
        self.shutdown()
        self._executor = _made(self._make)
        return True

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the workers if they are not the caller's; running pieces are not waited for."""
        if self._make is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)


@contextmanager
def hired(pool: Executor | Pool) -> Iterator[Workers]:
    """The workers of a pool inside a ``with``. Raises ``ExecutionError`` (QR425) for no pool."""
    if isinstance(pool, Workers):  # of an outer call, which ends them
        yield pool
        return
    workers = Workers(_checked(pool if isinstance(pool, Pool) else _pool_of(pool)))
    try:
        yield workers
    finally:
        workers.shutdown()


def _pool_of(executor: Any) -> Pool:
    if isinstance(executor, Executor):
        return Pool(executor)
    what = f"a {type(executor).__name__}"
    hint = "pass a concurrent.futures.Executor, or a qrecipe.Pool"
    if callable(executor):
        hint += "; qrecipe.Pool(function) takes a function that makes one"
    raise ExecutionError.of("QR425", f"pool is {what}, not an executor", hint=hint)


def _checked(pool: Pool) -> Pool:
    if not isinstance(pool.executor, Executor) and not callable(pool.executor):
        raise ExecutionError.of(
            "QR425", "executor is neither an executor nor a function that makes one"
        )
    if pool.factory is not None and not callable(pool.factory):
        raise ExecutionError.of("QR425", "factory must be a function that returns the model")
    if pool.workers is not None and (not isinstance(pool.workers, int) or pool.workers < 1):
        raise ExecutionError.of("QR425", f"workers is {shown(pool.workers)}: at least 1 is needed")
    return pool


def _made(make: Callable[[], Executor]) -> Executor:
    executor = make()
    if not isinstance(executor, Executor):
        text = f"the function of the pool returns a {type(executor).__name__}, not an executor"
        raise ExecutionError.of("QR425", text)
    return executor


def _check_processes(executor: Executor) -> None:
    """Refuse processes that are forked: torch's threads do not survive that, and calls hang."""
    context = getattr(executor, "_mp_context", None)
    if context is not None and context.get_start_method() == "fork":
        raise ExecutionError.of(
            "QR425",
            "the processes of this pool are forked, which torch's threads do not survive",
            hint='ProcessPoolExecutor(N, mp_context=multiprocessing.get_context("spawn"))',
        )


def _count(executor: Executor) -> int:
    """How many workers an executor has, where it is one of those that can be asked."""
    known = getattr(executor, "_max_workers", None)  # concurrent.futures and loky
    client = getattr(executor, "_client", None)  # Dask's
    if known is None and client is not None:
        known = sum(client.nthreads().values())
    return known if isinstance(known, int) and known > 0 else _FEW
