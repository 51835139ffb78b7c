"""The call of a part that goes furthest beyond its output range, where clipping shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from qrecipe._torch_ao import MinMaxObserver, ObserverBase
from qrecipe.audit.moving_averages import Extremes
from qrecipe.audit.ranges import static_observers
from qrecipe.audit.rounding import code_range
from qrecipe.audit.sample import Sample
from qrecipe.model.call import Inputs
from qrecipe.model.nested import cloned


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a part, and the extremes of what its last observer saw."""

    batch: int
    seen: Extremes
    sample: Sample


_REACHES: tuple[Callable[[Extremes], float], ...] = (
    lambda seen: -seen[0],
    lambda seen: seen[1],
    lambda seen: seen[1] - seen[0],
)
"""How far a call goes below a range, above it, and beyond both of its ends."""


class Candidates:
    """The calls that may go furthest beyond a range that is known only in the end.

    Whatever the range will be, the call with the lowest value, the one with the highest or the
    widest one goes furthest. The first call is left out, as it is kept for the audit.
    """

    def __init__(self, observer: ObserverBase) -> None:
        self._observer = observer
        self._calls = 0
        self._seen = _NOTHING
        self._kept: dict[Callable[[Extremes], float], Call] = {}

    def see(self, observer: nn.Module, args: tuple[Any, ...]) -> None:
        """Note the extremes of a tensor; an observer may see several in one call."""
        x = args[0].detach()
        if x.numel():
            low, high = self._seen
            self._seen = min(low, float(x.min())), max(high, float(x.max()))

    def note(
        self, part: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Keep the call that ends, if it may be the farthest."""
        seen, self._seen = self._seen, _NOTHING
        batch, self._calls = self._calls, self._calls + 1
        if not batch or seen == _NOTHING:
            return
        beaten = [
            reach
            for reach in _REACHES
            if reach not in self._kept or reach(seen) > reach(self._kept[reach].seen)
        ]
        if beaten:
            sample = Sample(Inputs(args, dict(kwargs)).cloned(), cloned(output))
            self._kept |= dict.fromkeys(beaten, Call(batch, seen, sample))

    def farthest(self) -> Call | None:
        """The call that goes furthest beyond the range that the observer has now."""
        kept = code_range(self._observer)
        if kept is None or not self._kept:
            return None
        return max(self._kept.values(), key=lambda call: outside(kept, call.seen))


_NOTHING: Extremes = (math.inf, -math.inf)


@contextmanager
def candidates_kept(
    parts: Iterable[fx.GraphModule],
) -> Iterator[Mapping[fx.GraphModule, Candidates]]:
    """Keep, for each part, the calls that may go furthest beyond the range of its last observer.

    Clipping at the output cannot be made up for later. The first batch would not show it, since a
    moving average starts from that one.
    """
    kept: dict[fx.GraphModule, Candidates] = {}
    with ExitStack() as hooks:
        for part in parts:
            observers = [observer for _, observer in static_observers(part)]
            if observers and type(observers[-1]) is not MinMaxObserver:
                kept[part] = Candidates(observers[-1])
                hooks.enter_context(observers[-1].register_forward_pre_hook(kept[part].see))
                hooks.enter_context(part.register_forward_hook(kept[part].note, with_kwargs=True))
        yield kept


def outside(kept: Extremes, seen: Extremes) -> float:
    """How far ``seen`` reaches beyond ``kept``."""
    return max(0.0, kept[0] - seen[0]) + max(0.0, seen[1] - kept[1])
