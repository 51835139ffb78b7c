"""A float model and a session of another runtime, compared by their outputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from qrecipe.audit.sqnr import Fidelity, Totals
from qrecipe.execution.batches import Forward, known_length, limited, peek
from qrecipe.execution.calls import calls_of
from qrecipe.model.copies import runnable_copy
from qrecipe.model.unfit import check_is_model
from qrecipe.runtimes.served import Served
from qrecipe.runtimes.session import Session
from qrecipe.terminal.progress import Progress, tracked


def output_fidelity(
    reference: nn.Module,
    session: Session,
    batches: Iterable[Any],
    forward: Forward | None,
    show: Progress,
) -> tuple[Fidelity | None, int]:
    """The fidelity of the session's outputs over all batches, and the number of batches.

    Raises ``CalibrationError`` if there are no batches, or the model or the session cannot take
    one, or they return different numbers of tensors.
    """
    check_is_model(reference)
    eager = runnable_copy(reference)
    first, stream = peek(batches)
    template = calls_of(eager, first, 0, forward)[0].output
    served, totals, count = Served(session, eager, template), Totals(), 0
    for index, batch in tracked(limited(stream), show, known_length(batches)):
        outputs = [
            [call.output for call in calls_of(model, batch, index, forward)]
            for model in (eager, served)
        ]
        totals.add(*outputs)
        count = index + 1
    return totals.fidelity(), count
