"""The trials between which accuracy and latency have to be weighed."""

from __future__ import annotations

from collections.abc import Sequence

from qrecipe.authoring.tune.search import Trial


def front_of(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The trials that are more accurate than any faster one, the fastest first.

    Trials without a metric or a latency are left out, as is the second measurement of the best.
    """
    measured = [
        (trial.latency, -trial.metric, place)
        for place, trial in enumerate(trials)
        if trial.latency is not None and trial.metric is not None and not trial.is_repeated
    ]
    found: list[Trial] = []
    for _, _, place in sorted(measured):
        if not found or trials[place].score > found[-1].score:
            found.append(trials[place])
    return tuple(found)
