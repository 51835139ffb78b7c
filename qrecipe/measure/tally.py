"""What is counted of one stored range while the data of today pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qrecipe.measure.distribution import Distribution
from qrecipe.measure.drift_report import SiteDrift
from qrecipe.measure.fidelity import Totals
from qrecipe.measure.stored import QRange, StoredRange


class Tally:
    """Sums over batches for one tensor."""

    def __init__(self, stored: StoredRange) -> None:
        self.stored = stored
        self._totals = Totals()
        self._values = Distribution()
        self._count = 0
        self._clipped = 0
        self._outside = 0
        self._is_bound = False

    def add(self, own: Tensor | None, result: Any, value: Any) -> None:
        """Count a batch.

        ``own`` is the float result for the model's own inputs, None where no kernel's counterpart
        is known; ``result`` what the model gave, ``value`` what float gives.
        """
        self._values.add(value)
        self._count += result.numel()
        if own is None:
            self._is_bound = True
            ends = self.stored.possible
            kept = result.dequantize()
            half = ends.scale / 2
            at_ends = int(((kept < ends.low + half) | (kept > ends.high - half)).sum())
            self._clipped += at_ends
            self._outside += int(self.stored.calibrated.share_outside(kept)) or at_ends
            return
        self._totals.add(own, result)
        self._clipped += int(self.stored.possible.share_outside(own))
        self._outside += int(self.stored.calibrated.share_outside(own))

    def result(self, now: QRange | None, position: int) -> SiteDrift:
        """What came out; ``now`` is the range of today's data, ``position`` the tensor's."""
        site, stored = self.stored.site, self.stored.calibrated
        fidelity = None if self._is_bound else self._totals.fidelity()
        count = max(1, self._count)
        return SiteDrift(
            name=site.name,
            op=site.op,
            tensor=self.stored.role if position == 1 else f"{self.stored.role} {position}",
            dtype=str(self.stored.spec.dtype),
            stored=stored,
            now=now,
            values=self._values.histogram(),
            clipped=self._clipped / count,
            outside=self._outside / count,
            is_bound=self._is_bound,
            sqnr_db=None if fidelity is None else fidelity.sqnr_db,
            sqnr_after_db=None if now is None else self._values.sqnr_db(self._kernel(now).rounded),
        )

    def _kernel(self, now: QRange) -> QRange:
        """The same scale and zero point with all integers that kernels have."""
        return QRange.of(now.scale, now.zero_point, self.stored.integers)
