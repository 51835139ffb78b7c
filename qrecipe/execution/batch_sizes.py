"""The warning about a converted model that is fixed to the batch size that it was made with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from qrecipe.audit.batch_sizes import shortfall
from qrecipe.errors.findings import Finding
from qrecipe.execution.part import Part
from qrecipe.model.call import Inputs
from qrecipe.model.dry_run import first_calls


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
