"""The proof that a rewritten graph still computes what the caller's model computes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe._torch_ao import is_observer
from qrecipe._torch_fx import FusedConvBatchNorm, FusedLinearBatchNorm
from qrecipe.errors.findings import ExecutionError, Finding, PlanError
from qrecipe.errors.text import first_line, quoted_whole
from qrecipe.model.addresses import members_of
from qrecipe.model.call import Inputs, bind, first_of
from qrecipe.model.copies import runnable_copy
from qrecipe.model.dry_run import try_out
from qrecipe.model.interpreter import Interpreter
from qrecipe.model.nodes import module_of
from qrecipe.model.same_graph import observes, same_calls
from qrecipe.model.trace_proof import Example, difference
from qrecipe.model.unfit import unfit
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.recipe.patterns import leave_float
from qrecipe.rules.structure import Member, joined

FLIPPED = 1e-3
"""The share of an output that rounding may flip, through a threshold, a ranking or a mask."""


def prove_fused(fused: fx.GraphModule, model: nn.Module, path: str, example: Example) -> None:
    """Compare the fused graph of the submodule at ``path`` with the caller's model.

    Raises ``PlanError`` (QR306), naming the first operation that computes something else.
    """
    found = _found(fused, example)
    if found is None:
        return
    expected = _module_results(model.get_submodule(path), path, example)
    members = _members(_first_unlike(expected, fused, example))
    message = f"{_shown(members)} computes something else after fusion: {found}"
    raise unfit(message, _left_whole(members))


def is_proven_by(call: Example, example: Example) -> bool:
    """Whether a call of a prepared graph begins with the example's samples, and its results are.

    Observers return what they see, so the fused graph gives the same.
    """
    size = example.inputs.batch_size
    first = None if size is None else first_of(call.inputs, call.output, size)
    inputs, output = first or (call.inputs, call.output)
    given, expected = ((each.args, dict(each.kwargs)) for each in (inputs, example.inputs))
    return (
        difference(expected, given) is None and difference(example.output, output, FLIPPED) is None
    )


def _left_whole(members: tuple[Member, ...]) -> str:
    key = "[fx] non_traceable_module_name"
    around = ""
    if members:
        around = next(path for path in members[0].scopes if path != members[0].module)
    if around:
        return f"leave the module around it float: {key} = [{quoted_whole(around)}]"
    return f"move it into a submodule, and leave that float: {key}"


def _shown(members: tuple[Member, ...]) -> str:
    return ", ".join(member.name for member in members) or "the model"


def prove_prepared(prepared: fx.GraphModule, fused: fx.GraphModule, example: Example) -> None:
    """Compare a prepared graph, without its observers and fake-quants, with the caller's model.

    It only runs if it is more than the ``fused`` graph with observers, which is proven already.

    Raises ``PlanError`` (QR306), naming the first site that computes something other than in
    the ``fused`` graph.
    """
    if _is_the_same(prepared, fused):
        return
    found = _found(prepared, example)
    if found is None:
        return
    node = _first_unlike(_results(fused, example), prepared, example)
    shown = _shown(_members(node))
    if node is not None and _divides_by_zero(module_of(node)):
        raise divides_by_zero(shown)
    site = None if node is None else node.meta.get("site")
    raise unfit(
        f"{shown} computes something else after it is prepared: {found}",
        leave_float(site) if site else "quantize parts of it: [fx] roots",
    )


def divides_by_zero(shown: str) -> PlanError:
    """The error (QR306) about a layer whose result is divided by the weights of a BatchNorm."""
    return unfit(
        f"{shown} cannot be trained with fake-quants: torch divides by the weights of its "
        "BatchNorm, and some are 0",
        "make them small instead: bn.weight.data[bn.weight == 0] = 1e-6",
    )


def prove_exported(
    program: fx.GraphModule, fused: fx.GraphModule, example: Example, inputs: Inputs
) -> None:
    """Raises ``PlanError`` (QR306) if a program is not the ``fused`` graph that it is made of.

    A program may reject sizes other than those of ``inputs``, batch sizes included.
    """
    found = _found(program, example)
    if found is not None:
        output = try_out(runnable_copy(fused), inputs.cloned(), fused)
        found = _found(program, Example(inputs, output))
    if found is not None:
        message = f"the model computes something else after it is exported: {found}"
        raise unfit(message, 'set executor = "fx", or leave the key out')


def prove_folded(folded: fx.GraphModule, trained: fx.GraphModule, inputs: Inputs) -> None:
    """Raises ``ExecutionError`` (QR405) if a program is not the trained one that it is made of."""
    output = try_out(passing(trained), inputs.cloned(), trained)
    found = _found(folded, Example(inputs, output))
    if found is not None:
        message = f"the model computes something else once its norms are folded: {found}"
        raise ExecutionError(Finding("QR405", message, hint="report the model"))


def check_unchanged(fused: fx.GraphModule, example: Example) -> None:
    """Raises ``PlanError`` (QR306) if a graph no longer computes what it did when it was proven."""
    if _found(fused, example) is not None:
        raise unfit("the model's weights have changed since it was compiled", "compile it again")


def _is_the_same(prepared: fx.GraphModule, fused: fx.GraphModule) -> bool:
    """Whether a prepared graph makes the same calls, of modules with the same tensors."""
    if not same_calls(fused.graph, prepared.graph, lambda node: False, observes):
        return False
    modules = dict(prepared.named_modules(remove_duplicate=False))
    for path, module in fused.named_modules(remove_duplicate=False):
        twin = modules[path]
        is_replaced = "forward" in vars(twin).keys() - vars(module)
        if path and (type(module) is not type(twin) or is_replaced):
            return False
    return _state(prepared).items() >= _state(fused).items()


def _state(graph_module: fx.GraphModule) -> dict[str, int]:
    """The identities of parameters and buffers."""
    tensors = chain(
        graph_module.named_parameters(remove_duplicate=False),
        graph_module.named_buffers(remove_duplicate=False),
    )
    return {name: id(tensor) for name, tensor in tensors}


def _divides_by_zero(module: Any) -> bool:
    is_fused = isinstance(module, (FusedConvBatchNorm, FusedLinearBatchNorm))
    return is_fused and bool((module.bn.weight == 0).any())


def _found(graph_module: fx.GraphModule, example: Example) -> str | None:
    """How the graph's output differs from the model's, or None."""
    probe = passing(graph_module)
    try:
        actual = try_out(probe, example.inputs.cloned(), graph_module)
    except Exception as error:
        raise_lack_of_memory(error)
        return f"it does not run: {first_line(error)}"
    return difference(example.output, actual, FLIPPED)


def passing(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy in eval mode in which observers and fake-quants return their input."""
    probe = runnable_copy(graph_module)
    for module in probe.modules():
        if is_observer(module):
            vars(module)["forward"] = lambda x, *_: x
    return probe


def _first_unlike(
    expected: Mapping[str, Tensor], graph_module: fx.GraphModule, example: Example
) -> fx.Node | None:
    """The first node with a different result, as far as results are known."""
    nodes: dict[str | None, fx.Node] = {_name(node): node for node in graph_module.graph.nodes}
    for name, actual in _results(graph_module, example).items():
        if name in expected and difference(expected[name], actual, FLIPPED) is not None:
            return nodes[name]
    return None


def _members(node: fx.Node | None) -> tuple[Member, ...]:
    return () if node is None else members_of(node)


def _name(node: fx.Node) -> str | None:
    members = members_of(node)
    return members[-1].name if members else None


class _Keeper(Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.results: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        name = _name(n)
        if name is not None and isinstance(result, Tensor):
            self.results.setdefault(name, result.clone())  # later code may write to it
        return result


def _results(graph_module: fx.GraphModule, example: Example) -> dict[str, Tensor]:
    """The results of a graph's operations, as far as they run, by the name of the last member."""
    probe = passing(graph_module)
    keeper = _Keeper(probe)
    with torch.no_grad(), suppress(Exception):
        keeper.run(*bind(probe, probe, example.inputs.cloned()))
    return keeper.results


def _module_results(model: nn.Module, path: str, example: Example) -> dict[str, Tensor]:
    """The results of the first call of the caller's modules, by their full paths."""
    results: dict[str, Tensor] = {}
    probe = runnable_copy(model)

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            results.setdefault(name, output.clone())

    for name, module in probe.named_modules():
        module.register_forward_hook(partial(keep, joined(path, name)))
    try_out(probe, example.inputs.cloned(), model)
    return results
