"""A float model and a session of another runtime, compared by their outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from qrecipe.audit.sqnr import Fidelity, Totals
from qrecipe.errors.findings import CalibrationError
from qrecipe.errors.text import first_line
from qrecipe.execution.batches import Forward, describe_batch, known_length, limited, peek
from qrecipe.execution.calls import calls_of
from qrecipe.model.copies import runnable_copy
from qrecipe.model.nested import tensors_in
from qrecipe.model.unfit import check_is_model
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.runtimes.served import Served
from qrecipe.runtimes.session import Session
from qrecipe.terminal.progress import Progress, tracked


def output_fidelity(
    reference: nn.Module,
    title: str,
    session: Session,
    batches: Iterable[Any],
    forward: Forward | None,
    show: Progress,
) -> tuple[Fidelity | None, int]:
    """The fidelity of the session's outputs over all batches, and the number of batches.

    Raises ``CalibrationError`` if there are no batches, or the model or the session cannot take
    one, or they return tensors of another number or shape.
    """
    check_is_model(reference)
    eager = runnable_copy(reference)
    first, stream = peek(batches)
    template = calls_of(eager, first, 0, forward)[0].output
    served, totals, count = Served(session, eager, template), Totals(), 0
    for index, batch in tracked(limited(stream), show, known_length(batches)):
        expected = [call.output for call in calls_of(eager, batch, index, forward)]
        with _of_session(title, batch, index):
            found = [call.output for call in calls_of(served, batch, index, forward)]
            _check_shapes(expected, found)
        totals.add(expected, found)
        count = index + 1
    return totals.fidelity(), count


@contextmanager
def _of_session(title: str, batch: Any, index: int) -> Iterator[None]:
    """Raises ``CalibrationError`` (QR402) about the session: the model has taken the batch."""
    try:
        yield
    except Exception as error:
        raise_lack_of_memory(error)
        cause = error.__cause__ if isinstance(error, CalibrationError) else error
        raise CalibrationError.of(
            "QR402",
            f"this session of {title} does not fit the model on batch {index} "
            f"({describe_batch(batch)}): {first_line(cause or error)}",
            hint="pass the float model that its file was exported from, and batches of sizes that "
            "the file takes",
        ) from error


def _check_shapes(expected: Any, found: Any) -> None:
    for one, other in zip(tensors_in(expected), tensors_in(found), strict=True):
        if one.shape != other.shape:
            raise ValueError(f"it returns {list(other.shape)}, the model {list(one.shape)}")
