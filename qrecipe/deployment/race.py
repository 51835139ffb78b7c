"""Sessions that are timed in turns."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from typing import TypeVar

from qrecipe.measure.turns import Seconds
from qrecipe.model.call import Inputs
from qrecipe.runtimes.session import Session

Key = TypeVar("Key", bound=Hashable)

_WARM_UP = 3
_LEAST_ROUNDS = 7
_MOST_ROUNDS = 30
_BUDGET = 20.0
"""Seconds to spend beyond the least number of rounds."""


def race(sessions: Mapping[Key, Session], inputs: Inputs, threads: int) -> dict[Key, Seconds]:
    """The seconds of a call of each, round by round.

    With one thread this is CPU time, which other load on the machine does not add to; several
    threads share their work, and what counts is wall time.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    found: dict[Key, list[float]] = {key: [] for key in sessions}
    for _ in range(_WARM_UP):
        for session in sessions.values():
            session.run(inputs.cloned())
    end = time.perf_counter() + _BUDGET
    for number in range(_MOST_ROUNDS):
        if number >= _LEAST_ROUNDS and time.perf_counter() > end:
            break
        for key, session in sessions.items():
            given = inputs.cloned()  # some models write to their inputs
            started = clock()
            session.run(given)
            found[key].append(clock() - started)
    return {key: tuple(seconds) for key, seconds in found.items()}
