"""Programs compiled by torch's Inductor, whose kernels compute in integers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

from torch import fx, nn

from qrecipe._torch_ao import quiet
from qrecipe.artifact.export.lowering import Lowering, layers_of, lowered_findings
from qrecipe.artifact.export.program import Program, Sizes, for_sizes
from qrecipe.errors.findings import ExecutionError, Finding
from qrecipe.errors.text import counted, shown_names
from qrecipe.errors.warn import settle
from qrecipe.execution.provenance import keep_provenance
from qrecipe.model.addresses import site_of
from qrecipe.model.call import Inputs
from qrecipe.planning.convolution import Convolution
from qrecipe.planning.engines import PADS_TOO_WIDELY, pads_too_widely
from qrecipe.process.memory import failing_as
from qrecipe.process.neutral import neutral
from qrecipe.process.state import unheard
from qrecipe.process.warnings import held_back
from qrecipe.recipe.patterns import leave_float
from qrecipe.runtimes.inductor import KERNELS, Compiled, check_compiler, counted_kernels


@neutral
def lower(converted: nn.Module, example_inputs: Any) -> nn.Module:
    """Compile a model that PT2E converted with ``torch.compile``, and audit its integer kernels.

    ``example_inputs`` are as for `qrecipe.plan`. The result is called as the model is; it has no
    gradients, and its weights are frozen. ``result.lowering`` says how many integer kernels there
    are, and how long compiling took: for some models minutes. Other sizes are compiled when they
    occur. `qrecipe.provenance` works on it; what reads single sites needs ``converted``. Needs a
    C++ compiler.

    Raises:
        ArtifactError: the model was not converted by qrecipe (QR501) or not as a program (QR512).
        AuditError: a convolution or linear layer stays float (QR410), or a compiled kernel computes
            something other than the program (QR411, QR412), as kernels that saturate do.
        ExecutionError: torch cannot compile the program (QR405).
        QRecipeError: there is no C++ compiler (QR602).
    """
    check_compiler()
    inputs = Inputs.from_batch(example_inputs)
    program = Program.of(converted, inputs)
    module = Lowered(for_compiler(converted, for_sizes(inputs, "batch"), "batch").module())
    module.lowering = audited(program, lambda: program.inputs.cloned().call(module))
    keep_provenance(module, converted)
    return module


class Lowered(Compiled):
    """A compiled program, with what the compiler made of it."""

    lowering: Lowering


def for_compiler(converted: nn.Module, inputs: Inputs, sizes: Sizes) -> Any:
    """torch's exported program, in which its compiler finds the layers with integers.

    It does not find those that read a dequantized tensor together with something else, such as a
    residual sum, or a weight with another layer, and it joins equal operators. So each of them
    gets an operator with another ``quant_min``, which dequantizing does not compute with.
    """
    program = Program.of(converted, inputs)
    graph, layers = program.graph_module.graph, set(layers_of(program.graph_module))
    for node in list(graph.nodes):
        if ".dequantize_per_tensor" in str(node.target):
            others = [user for user in node.users if user not in layers]
            _read_apart(node, [others] if others else [])
        elif ".dequantize_per_channel" in str(node.target):
            _read_apart(node, [[user] for user in node.users][1:])
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program.exported(sizes)


_QUANT_MIN = {"dequantize_per_tensor": 3, "dequantize_per_channel": 4}
"""The position of an argument."""


def _read_apart(node: fx.Node, groups: Sequence[Sequence[fx.Node]]) -> None:
    """Give each group of readers an operator that differs from all others, in place."""
    at = _QUANT_MIN[str(node.target).split(".")[1]]
    low: Any = node.args[at]
    for distance, group in enumerate(groups, start=1):
        with node.graph.inserting_after(node):
            own = node.graph.node_copy(node)
        own.args = (*node.args[:at], low + distance, *node.args[at + 1 :])
        node.replace_all_uses_with(own, group.__contains__)


def audited(program: Program, compile_and_run: Callable[[], Any]) -> Lowering:
    """Compile a program, and compare its kernels with it.

    Raises what `lower` raises.
    """
    layers = list(layers_of(program.graph_module))
    settle(list(_wrong(program, layers)), ())
    started = time.perf_counter()
    with (
        failing_as(ExecutionError, "QR405", "torch cannot compile the program", "report the model"),
        unheard(),
        quiet(),
        held_back([("", Warning)]),
        counted_kernels() as kernels,
    ):
        found = compile_and_run()
    seconds = time.perf_counter() - started
    alone = {site.name for site in program.plan.sites if site.mode == "weight_only"}
    rounded = [node for node in layers if site_of(node) not in alone]
    missing = list(_missing(rounded, kernels))
    settle(missing or list(lowered_findings(program, found, _lowered)), ())
    able = tuple(name for _, names in KERNELS.values() for name in names)
    made = [node for node in rounded if str(node.target).startswith(able)]
    left = [site_of(node) or "" for node in layers if node not in made]
    return Lowering("Inductor", len(made), tuple(left), seconds)


def _lowered(graph_module: fx.GraphModule, inputs: Inputs) -> Any:
    return inputs.call(Lowered(graph_module))


def _wrong(program: Program, layers: Sequence[fx.Node]) -> Iterator[Finding]:
    """Convolutions whose kernel could end the process (QR411): the compiler runs all on onednn."""
    sites = {site.name: site for site in program.plan.sites}
    for node in layers:
        shape = _shape_of(program.graph_module, node)
        if shape is not None and pads_too_widely(shape):
            site = sites[site_of(node) or ""]
            text = f"{site.name} ({site.op}) cannot be compiled: {PADS_TOO_WIDELY}"
            yield Finding("QR411", text, site.rule.location, hint=leave_float(site.name))


def _shape_of(graph_module: fx.GraphModule, node: fx.Node) -> Convolution | None:
    """That of a convolution for which the compiler has an integer kernel."""
    if str(node.target) not in ("aten.conv1d.default", "aten.conv2d.default"):
        return None
    given: dict[str, Any] = {
        "stride": [1],
        "padding": [0],
        "dilation": [1],
        "groups": 1,
        **dict(zip(_CONVOLUTION, node.args, strict=False)),
    }
    weight = attrgetter(given["weight"].all_input_nodes[0].target)(graph_module)
    return Convolution(
        transposed=False,
        kernel=tuple(weight.shape[2:]),
        stride=given["stride"],
        padding=given["padding"],
        output_padding=(),
        dilation=given["dilation"],
        groups=given["groups"],
        inputs=weight.shape[1],
        outputs=weight.shape[0] // given["groups"],
    )


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
"""The arguments of aten's operators."""


def _missing(layers: Sequence[fx.Node], kernels: Mapping[str, int]) -> Iterator[Finding]:
    """Layers that did not become integer kernels, by kind (QR410)."""
    for counter, (kind, operators) in KERNELS.items():
        able = [site_of(node) or "" for node in layers if str(node.target).startswith(operators)]
        made = kernels.get(counter, 0)
        if made < len(able):
            yield Finding(
                "QR410",
                f"torch's compiler left {counted(len(able) - made, kind)} of {len(able)} float: "
                f"{shown_names(able)}",
                hint="it has integer kernels for weights with a scale per channel, and none for "
                "one row of up to 16 numbers",
            )
