"""What runs in a worker: one piece of the work in a parcel."""

from __future__ import annotations

import pickle
import threading
import traceback
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from qrecipe.errors.findings import Finding, QRecipeError
from qrecipe.errors.warn import collected
from qrecipe.pool.parcel import Compute, Parcel
from qrecipe.pool.received import importable, received, worker
from qrecipe.process import ranks
from qrecipe.process.neutral import neutral

_MOST = 2
"""How many works a worker keeps: a search ranks sites on the side."""

_ALONE = threading.Lock()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The value of a piece or its error, and the warnings on the way, those of a start included.

    ``trace`` is the traceback of an error that is not ours.
    """

    worker: str
    value: Any = None
    error: Exception | None = None
    trace: str | None = None
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True)
class _Begun:
    compute: Compute
    path: tuple[str, ...]
    findings: tuple[Finding, ...]


_BEGUN: OrderedDict[str, _Begun] = OrderedDict()
"""Works that this process is ready for, by the digest of their parcel."""


def run(parcel: Parcel, piece: Any) -> Outcome:
    """Compute a piece; one at a time, since a work has models that pieces change and put back."""
    with _ALONE:
        try:
            return _run(parcel, piece)
        except Exception as error:
            trace = None if isinstance(error, QRecipeError) else traceback.format_exc()
            return Outcome(worker(), error=_that_travels(error), trace=trace)


@neutral
@ranks.alone()
def _run(parcel: Parcel, piece: Any) -> Outcome:
    with parcel.settings.used(), collected() as findings:
        begun = _begun(parcel)
        with importable(begun.path):
            value = begun.compute(piece)
    return Outcome(worker(), value, findings=tuple(dict.fromkeys((*begun.findings, *findings))))


def _begun(parcel: Parcel) -> _Begun:
    if parcel.sha256 in _BEGUN:
        _BEGUN.move_to_end(parcel.sha256)
        return _BEGUN[parcel.sha256]
    while len(_BEGUN) >= _MOST:  # before another one takes memory
        _BEGUN.popitem(last=False)
    with collected() as findings:
        got = received(parcel)
        with importable(got.path):
            compute = got.work.begun(got.batches)
    _BEGUN[parcel.sha256] = _Begun(compute, got.path, tuple(findings))
    return _BEGUN[parcel.sha256]


def _that_travels(error: Exception) -> Exception:
    """The error if it can be pickled, or what it says."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
