"""The executors by the names that plans give them, and what each provides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import fx, nn

from qrecipe.execution.eager import executor as eager
from qrecipe.execution.fx import executor as graph_mode
from qrecipe.execution.isolated import Calibrate, Isolated
from qrecipe.execution.part import Compiled, Exportable, Realised, Recorded, Task
from qrecipe.execution.pt2e import executor as pt2e
from qrecipe.model.call import Inputs
from qrecipe.planning.plan import Site
from qrecipe.recipe.schema import Executor as Name


class Executor(Protocol):
    """What carries out plans: a module ``executor`` with these functions."""

    def compile(self, task: Task) -> Compiled:
        """The plan put into the model; the graphs of the inventory may change."""

    def isolated(self, task: Task, sites: Sequence[Site], calibrate: Calibrate) -> Isolated:
        """Each of ``sites`` quantized alone, in a float model that can take it in.

        ``calibrate`` runs the caller's batches through a prepared model.
        """

    def realised_sites(self, converted: fx.GraphModule) -> Mapping[str, Realised]:
        """What each site of a converted graph became; one that conversion removed is missing."""

    def rebuilt(self, recorded: Recorded) -> nn.Module:
        """The converted model that the plan gave, with state of the right shapes and no meaning.

        Nothing is calibrated, audited or run. Raises ``ArchitectureError`` if the model is not
        the one that was quantized.
        """

    def exportable_parts(
        self,
        recorded: Recorded,
        converted: Mapping[str, fx.GraphModule],
        inputs: Mapping[str, Inputs],
    ) -> Mapping[str, Exportable]:
        """The parts of a stored model for exporters, audited, by their paths.

        ``converted`` are those that were loaded, ``inputs`` is one call of each. Raises
        ``ArtifactError`` (QR512) if they cannot be exported, and what `rebuilt` raises.
        """


_EXECUTORS: Mapping[Name, Executor] = {"fx": graph_mode, "eager": eager, "pt2e": pt2e}


def executor_of(name: Name) -> Executor:
    """The executor of this name."""
    return _EXECUTORS[name]


def traced_paths(name: Name, roots: Sequence[str]) -> tuple[str, ...]:
    """The paths of the parts that are graphs with this executor, given ``[fx] roots``."""
    return () if name == "eager" else tuple(roots) or ("",)
