"""What was measured of each site, which can be plotted too."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence

from qrecipe.measure.pages.charts import plot_bars
from qrecipe.measure.pages.sections import Bars
from qrecipe.terminal.report import Result


class SiteResult(Result):
    """A result with a bar for each site."""

    __slots__ = ()

    @abstractmethod
    def _bars(self) -> Sequence[Bars]:
        """What a plot shows, side by side; a page shows the first."""

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plot the sites as bars; the suffix of ``path`` sets the format.

        Raises ``QRecipeError`` if matplotlib is missing (QR602) or the file cannot be written
        (QR421).
        """
        plot_bars(self._bars(), path)
