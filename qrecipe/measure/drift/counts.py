"""Statistics of today's data for one stored range."""

from __future__ import annotations

from torch import Tensor

from qrecipe.measure.drift.distribution import Distribution
from qrecipe.measure.drift.report import SiteDrift
from qrecipe.measure.drift.stored_ranges import QRange, StoredRange


class Tally:
    """Sums over batches for one tensor."""

    def __init__(self, stored: StoredRange) -> None:
        self.stored = stored
        self._values = Distribution()
        self._count = 0
        self._clipped = 0
        self._outside = 0
        self._is_bound = False

    def add(self, value: Tensor) -> None:
        """Count the float values of a batch."""
        self._count_values(value)
        self._clipped += int(self.stored.possible.outside(value).sum())
        self._outside += int(self.stored.calibrated.outside(value).sum())

    def add_rounded(self, kept: Tensor) -> None:
        """Count the kernel's own results for a batch, if its float counterpart is not known."""
        self._is_bound = True
        self._count_values(kept)
        clipped = self.stored.possible.at_ends(kept)
        self._clipped += int(clipped.sum())
        self._outside += int((clipped | self.stored.calibrated.outside(kept)).sum())

    def _count_values(self, values: Tensor) -> None:
        self._values.add(values)
        self._count += values.numel()

    def result(self, now: QRange | None, position: int) -> SiteDrift:
        """The result; ``now`` is the range of today's data, ``position`` that of the tensor."""
        site, stored = self.stored.site, self.stored.calibrated
        after = None if now is None else self.stored.with_all_integers(now)
        count = max(1, self._count)
        return SiteDrift(
            name=site.name,
            op=site.op,
            tensor=self.stored.role if position == 1 else f"{self.stored.role} {position}",
            dtype=str(self.stored.spec.dtype),
            stored=stored,
            now=now,
            values=self._values.histogram(),
            is_finite=self._values.is_finite,
            clipped=self._clipped / count,
            clipped_after=0.0 if after is None else self._values.share(after.outside),
            outside=self._outside / count,
            is_bound=self._is_bound,
            sqnr_db=self._sqnr_db(self.stored.possible),
            sqnr_after_db=self._sqnr_db(after),
        )

    def _sqnr_db(self, kernel: QRange | None) -> float | None:
        if kernel is None or self._is_bound:
            return None
        return self._values.sqnr_db(kernel.rounded)
