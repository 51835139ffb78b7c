"""What an exported file computes, compared with the model that it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qrecipe.artifact.export.lowering import Lowering
from qrecipe.audit.sample import RIGHT_DB, TOLERANCE_DB
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import Finding
from qrecipe.model.call import Inputs
from qrecipe.model.nested import tensors_in

_FLIPPED = 0.01
"""The share of integers that may differ: ranks and thresholds flip at ties."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What a file is given, and what it should return.

    ``as_float`` is the output of the float model, or None where that is unknown.
    """

    inputs: Inputs
    expected: Any
    as_float: Any


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """A file that was written, by a run that it repeats, and what a compiler made of it."""

    run: Run
    lowering: Lowering | None = None


def judged(run: Run, actual: Sequence[Tensor], where: str) -> Iterator[Finding]:
    """QR414 if a file gives other results in a runtime, QR415 if that cannot be told."""
    tensors = list(tensors_in(run.expected))
    if len(actual) != len(tensors):
        yield unjudged(f"it returns {len(actual)} tensors, the model {len(tensors)}")
        return
    reached = output_sqnr_db(tensors, list(actual))
    if reached is None:
        if not all(map(mostly_equal, tensors, actual)):
            yield _wrong("different integers", where)
        return
    if reached >= RIGHT_DB:
        return
    if run.as_float is None:
        yield unjudged(f"it is {reached:.1f} dB from the model, which may be rounding")
        return
    # depth amplifies single results that were rounded the other way
    floats = list(tensors_in(run.as_float))
    own, others = output_sqnr_db(floats, tensors), output_sqnr_db(floats, list(actual))
    if own is None or others is None or others >= own - TOLERANCE_DB:
        return
    yield _wrong(
        f"{reached:.1f} dB from the quantized model, and {others:.1f} dB from float (the model: "
        f"{own:.1f} dB)",
        where,
    )


def mostly_equal(expected: Tensor, actual: Tensor) -> bool:
    if expected.shape != actual.shape:
        return False
    return int((expected != actual).sum()) <= _FLIPPED * expected.numel()


def unjudged(why: str) -> Finding:
    return Finding(
        "QR415",
        f"the exported file was not compared with the model: {why}",
        hint="run it where you will use it, on data with known results",
    )


def _wrong(what: str, where: str) -> Finding:
    return Finding(
        "QR414",
        f"the exported file gives different results in {where}: {what}",
        hint="torch's exporter lost something: leave parts of the model float until the file "
        "is right, and report the model",
    )
