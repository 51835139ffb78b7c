"""A converted program as torch's exporters and compilers know it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn

from qrecipe.errors.findings import ArtifactError, Finding
from qrecipe.errors.text import first_line
from qrecipe.execution.plain_scales import with_plain_scales
from qrecipe.execution.provenance import Provenance, converted_graphs, provenance, stored_plan
from qrecipe.model.call import Inputs, bound
from qrecipe.model.exported import exported, exported_as_it_is, of_several
from qrecipe.model.tracer import OTHER_SHAPES
from qrecipe.planning.plan import Plan
from qrecipe.process.memory import raise_lack_of_memory

Sizes = Literal["batch"] | None
"""What is free in a file: the size of the batch, or nothing."""


def for_sizes(inputs: Inputs, sizes: Sizes) -> Inputs:
    """The inputs to export with: several samples, where their number is to be free."""
    return inputs if sizes is None else of_several(inputs)


@dataclass(frozen=True, slots=True)
class Program:
    """A model that PT2E converted, its plan, and one call of it.

    ``graph_module`` computes the same as the model, with scales as numbers in its code.
    """

    converted: nn.Module
    graph_module: fx.GraphModule
    plan: Plan
    inputs: Inputs

    @staticmethod
    def of(converted: nn.Module, inputs: Inputs) -> Program:
        """The program of a model.

        Raises ``ArtifactError`` if qrecipe did not convert it (QR501), or not as a program (QR512),
        and ``PlanError`` (QR307) if the inputs do not fit its signature.
        """
        graphs = converted_graphs(converted)
        plan = stored_plan(provenance(converted))
        if plan.executor != "pt2e" or "" not in graphs:
            message = "only a whole model that PT2E converted is a program of torch.export"
            hint = 'quantize it with executor = "pt2e", and without [fx] roots'
            raise ArtifactError(Finding("QR512", message, hint=hint))
        graph_module = with_plain_scales(graphs[""])
        _leave_out_defaults(graph_module, inputs)
        return Program(converted, graph_module, plan, _in_order(inputs, graph_module))

    @property
    def origin(self) -> Provenance:
        return provenance(self.converted)

    def output(self) -> Any:
        """What the model gives for the inputs."""
        with torch.no_grad():
            return self.inputs.cloned().call(self.converted)

    def exported(self, sizes: Sizes) -> Any:
        """torch's program, in which the first size of each input is free, or none."""
        export = exported_as_it_is if sizes is None else exported
        try:
            return export(self.graph_module, self.inputs.args, self.inputs.kwargs)
        except Exception as error:
            raise_lack_of_memory(error)
            message = f"torch cannot export the program: {first_line(error)}"
            hint = "report the model"
            if OTHER_SHAPES in message:
                message = first_line(error)
                hint = "pass inputs like those that it was quantized with"
            raise ArtifactError(Finding("QR512", message, hint=hint)) from error


def _in_order(inputs: Inputs, graph_module: fx.GraphModule) -> Inputs:
    """The inputs with keywords in the order of the signature, as files take them."""
    names = bound(graph_module, inputs).arguments
    return Inputs(
        inputs.args, {name: inputs.kwargs[name] for name in names if name in inputs.kwargs}
    )


def _leave_out_defaults(graph_module: fx.GraphModule, inputs: Inputs) -> None:
    """Make defaults constants in place: torch.export mixes up keywords that skip a parameter."""
    given = bound(graph_module, inputs).arguments
    for node in graph_module.graph.find_nodes(op="placeholder"):
        if str(node.target) not in given:
            for user in list(node.users):
                _give_default(user, node)
            graph_module.graph.erase_node(node)
    graph_module.recompile()


def _give_default(user: fx.Node, placeholder: fx.Node) -> None:
    def given(node: fx.Node) -> Any:
        return placeholder.args[0] if node is placeholder else node

    user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), given)
