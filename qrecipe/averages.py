"""Moving averages that still cling to the first batches when calibration ends."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import fx, nn

from qrecipe._torch_ao import MovingAverageMinMaxObserver
from qrecipe.errors import Finding
from qrecipe.fx.emission import observed_name
from qrecipe.rules import listed

NARROW_RATIO = 3.0
"""How much narrower than the median batch a range may be; batches differ by less themselves."""

History = list[tuple[float, float]]
"""The averaged minimum and maximum of an observer after each of its calls."""


@contextmanager
def watched(
    parts: Sequence[fx.GraphModule],
) -> Iterator[Mapping[MovingAverageMinMaxObserver, History]]:
    """Note the averages of all activation observers of that kind while batches run.

    They say what each batch spanned, so that nothing has to be computed meanwhile.
    """
    histories: dict[MovingAverageMinMaxObserver, History] = {}
    handles = []
    for part in parts:
        for _, observer in _observers(part):
            if observer not in histories:
                histories[observer] = [_average(observer)]
                hook = partial(_note, histories[observer])
                handles.append(observer.register_forward_hook(hook))
    try:
        yield histories
    finally:
        for handle in handles:
            handle.remove()


def average_findings(
    parts: Sequence[fx.GraphModule],
    histories: Mapping[MovingAverageMinMaxObserver, History],
    batches: int,
) -> Iterator[Finding]:
    """Sites whose range is far narrower than what most batches spanned (QR232).

    Observers that are called several times a batch are left out: `branches` and `around` see to
    those.
    """
    found: dict[str, tuple[float, float]] = {}
    for part in parts:
        for name, observer in _observers(part):
            history = histories[observer]
            if len(history) != batches + 1:
                continue
            typical = statistics.median(_spans(history, float(observer.averaging_constant)))
            final = _span(*history[-1])
            if typical > NARROW_RATIO * final:
                found[name] = final, typical
    if found:
        final, typical = next(iter(found.values()))
        yield Finding(
            "QR232",
            f"the moving average clings to the first batches at {listed(tuple(found))}: the first "
            f"of these ends with a range of {final:.3g}, and most batches span {typical:.3g}",
            hint='shuffle the batches, observe with a larger averaging_constant, or with "minmax"',
        )


def _observers(part: fx.GraphModule) -> Iterator[tuple[str, MovingAverageMinMaxObserver]]:
    """The observers that average, of fake-quants too, each with the site that it observes."""
    for node in part.graph.nodes:
        if node.op != "call_module":
            continue
        module: nn.Module = part.get_submodule(str(node.target))
        observer = getattr(module, "activation_post_process", module)
        if type(observer) is MovingAverageMinMaxObserver:
            yield observed_name(node), observer


def _note(history: History, observer: nn.Module, args: Any, output: Any) -> None:
    assert isinstance(observer, MovingAverageMinMaxObserver)
    history.append(_average(observer))


def _average(observer: MovingAverageMinMaxObserver) -> tuple[float, float]:
    return float(observer.min_val), float(observer.max_val)


def _spans(history: History, constant: float) -> Iterator[float]:
    """What each call spanned: the average moved towards it by ``constant`` of the way."""
    for (low, high), (next_low, next_high) in itertools.pairwise(history):
        if not math.isfinite(low):  # the first call of all sets the average
            yield _span(next_low, next_high)
        else:
            yield _span(low + (next_low - low) / constant, high + (next_high - high) / constant)


def _span(low: float, high: float) -> float:
    """The width of a range as a scale covers it, zero included."""
    return max(high, 0.0) - min(low, 0.0)
