"""Converted models at another batch size than they were made with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe._torch_ao import quiet
from qrecipe.audit.sample import JUDGEABLE_DB
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import Finding
from qrecipe.errors.text import first_line
from qrecipe.execution.part import Part
from qrecipe.model.call import Inputs, batch_size, bind, head
from qrecipe.model.copies import failing_quietly, runnable_copy
from qrecipe.model.dry_run import first_calls
from qrecipe.model.interpreter import Interpreter
from qrecipe.model.nested import UncopyableError, map_tensors
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.process.state import random_numbers_kept


def size_findings(
    model: nn.Module, converted: nn.Module, parts: Sequence[Part], inputs: Inputs, output: Any
) -> Iterator[Finding]:
    """Try the converted model at another batch size, and name what fails (QR235).

    ``output`` is what the float ``model`` returns for ``inputs``, None if that is not known.
    """
    found = shortfall(model, converted, inputs, output)
    if found is None:
        return
    paths = [part.path for part in parts]
    calls = {"": found.inputs} if "" in paths else first_calls(model, paths, found.inputs)
    faults = (
        part.fault(converted.get_submodule(part.path), calls[part.path])
        for part in parts
        if part.path in calls
    )
    fault = next(filter(None, faults), None)
    yield Finding(
        "QR235",
        f"with a batch of {found.inputs.batch_size}, which the float model takes, the quantized "
        f"model {found.what}; it was made with {inputs.batch_size}"
        + (f", and {fault.what} is fixed to that" if fault else ""),
        hint=(fault.hint if fault else None)
        or "give example inputs and batches of the size that it will run with",
    )


_CAUSE_DB = 6.0
"""How much closer to float the output must be at its own size, if the size is to blame."""


@dataclass(frozen=True, slots=True)
class Shortfall:
    """What goes wrong with ``inputs``, which the float model accepts."""

    inputs: Inputs
    what: str


def shortfall(
    model: nn.Module, converted: nn.Module, inputs: Inputs, output: Any = None
) -> Shortfall | None:
    """Run the converted model at another batch size; None if it is as good as at its own.

    ``output`` is what the float model returns for ``inputs``, if known; it only runs if the
    converted one fails or differs. Nothing is claimed where the float model does not accept the
    other size, or where outputs are not batches.
    """
    other = inputs.of_another_size()
    if other is None or (output is not None and batch_size(output) != inputs.batch_size):
        return None
    actual, error = tried(converted, other)
    follows = error is None and batch_size(actual) == other.batch_size
    if follows and (output is None or _is_near(_like(output, other), actual)):
        return None
    expected, refused = tried(model, other)
    if refused is not None or batch_size(expected) != other.batch_size:
        return None
    if error is not None:
        return Shortfall(other, f"fails: {error}")
    if not follows:
        return Shortfall(other, "returns results of another size")
    db = output_sqnr_db(expected, actual)
    if db is None or _is_near(expected, actual):
        return None
    usual = output_sqnr_db(expected, _like(tried(converted, inputs)[0], other))
    if usual is None or usual < db + _CAUSE_DB:
        return None
    return Shortfall(other, f"is {db:.1f} dB from float instead of {usual:.1f}")


def _is_near(expected: Any, actual: Any) -> bool:
    db = output_sqnr_db(expected, actual)
    return db is None or db >= JUDGEABLE_DB


def _like(output: Any, other: Inputs) -> Any:
    """An output cut, or doubled, as the inputs were."""
    try:
        if other.batch_size == 1:
            return head(output, 1)
        return map_tensors(lambda x: torch.cat([x, x]), output)
    except UncopyableError:
        return None


def tried(model: nn.Module, inputs: Inputs) -> tuple[Any, str | None]:
    """The output of a model, or why there is none; state that its code keeps does not change."""
    probe = model if isinstance(model, fx.GraphModule) else failing_quietly(runnable_copy(model))
    try:
        with torch.no_grad(), quiet(), random_numbers_kept():
            return inputs.cloned().call(probe), None
    except Exception as error:
        raise_lack_of_memory(error)
        return None, first_line(error)


class _Watched(Interpreter):
    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.sizes: dict[fx.Node, int | None] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.sizes[n] = None
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.dim():
            self.sizes[n] = result.shape[0]
        return result


def faulty_node(graph_module: fx.GraphModule, usual: Inputs, other: Inputs) -> fx.Node | None:
    """The first node that fails, or whose results keep the batch size of the ``usual`` inputs."""
    before, _ = _sizes(graph_module, usual)
    after, has_failed = _sizes(graph_module, other)
    size = usual.batch_size
    for node, now in after.items():
        if node.op.startswith("call") and now == before.get(node) == size != other.batch_size:
            return node
    return list(after)[-1] if has_failed else None


def _sizes(graph_module: fx.GraphModule, inputs: Inputs) -> tuple[dict[fx.Node, int | None], bool]:
    """The first size of each result as far as the graph runs, and whether it failed."""
    watched = _Watched(graph_module)
    try:
        with torch.no_grad(), quiet():
            watched.run(*bind(graph_module, graph_module, inputs.cloned()))
    except Exception:
        return watched.sizes, True
    return watched.sizes, False
