"""The audit of a model around its roots: each call of a root, and the code that calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from qrecipe._torch_ao import quiet
from qrecipe.audit.sample import JUDGEABLE_DB, Sample
from qrecipe.audit.sqnr import output_sqnr_db
from qrecipe.errors.findings import Finding
from qrecipe.errors.text import first_line
from qrecipe.model.call import Inputs
from qrecipe.model.copies import copy_around, runnable_copy
from qrecipe.model.nested import cloned, tensors_in
from qrecipe.model.trace_proof import difference
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.process.state import random_numbers_kept


def around_findings(
    before: nn.Module, converted: nn.Module, roots: Sequence[str], inputs: Inputs
) -> Iterator[Finding]:
    """Check that the code around the roots computes what it did ``before`` (QR412, QR413).

    The float model is run with roots that return what the converted roots returned, so the
    outputs only differ if the code around a root reads more than its output.
    """
    answers: dict[str, list[Any]] = {path: [] for path in roots}
    try:
        with ExitStack() as hooks:
            for path in roots:
                root = converted.get_submodule(path)
                hooks.enter_context(root.register_forward_hook(partial(_keep, answers[path])))
            actual = _run(copy_around(converted, roots), inputs)
    except Exception as error:
        raise_lack_of_memory(error)
        yield Finding(
            "QR413",
            f"the converted model fails in the code around its roots: {first_line(error)}",
            hint="code around a root may only call it: a quantized root has other classes, and "
            "methods instead of weight tensors",
        )
        return
    answering = runnable_copy(before)
    for path in roots:
        vars(answering.get_submodule(path))["forward"] = _answering(answers[path])
    try:
        found = difference(_run(answering, inputs), actual)
    except Exception as error:
        raise_lack_of_memory(error)
        found = first_line(error)
    if found is not None:
        yield Finding(
            "QR412",
            f"the code around the quantized roots computes something other than before: {found}",
            hint="code around a root may only call it, not read its attributes",
        )


def dtype_findings(converted: nn.Module, samples: Mapping[str, Sample]) -> Iterator[Finding]:
    """Roots whose output has another dtype than before (QR412), for example under autocast."""
    for path, sample in samples.items():
        before, after = map(_dtypes, _outputs(converted.get_submodule(path), sample))
        if before != after:
            yield Finding(
                "QR412",
                f'fx.roots "{path}" returns {after}, but returned {before} before conversion',
                hint="quantized models return float32: call the root outside autocast",
            )


def _dtypes(value: Any) -> str:
    dtypes = dict.fromkeys(str(tensor.dtype) for tensor in tensors_in(value))
    return ", ".join(name.removeprefix("torch.") for name in dtypes)


def call_findings(
    converted: nn.Module, first: Mapping[str, Sample], later: Mapping[str, Sequence[Sample]]
) -> Iterator[Finding]:
    """Roots that are called several times in a forward with inputs too different (QR231)."""
    for path, samples in later.items():
        part = converted.get_submodule(path)
        calls = (first[path], *samples)
        reached = [output_sqnr_db(*_outputs(part, sample)) for sample in calls]
        judged = [db for db in reached if db is not None]
        if judged and min(judged) < JUDGEABLE_DB:
            listed = ", ".join("-" if db is None else f"{db:.0f}" for db in reached)
            yield Finding(
                "QR231",
                f'fx.roots "{path}" is called {len(reached)} times in one forward, and all calls '
                f"share one set of ranges: they reach {listed} dB against float",
                hint="give each call its own copy of the module, or remove it from fx.roots; "
                "minmax covers the widest call at the expense of the others",
            )


def _outputs(part: nn.Module, sample: Sample) -> tuple[Any, Any]:
    """The output for the first samples: that of before and that of now."""
    return sample.on_head(lambda own: (own.output, _run(part, own.inputs)))


def _run(model: nn.Module, inputs: Inputs) -> Any:
    with torch.no_grad(), quiet(), random_numbers_kept():
        torch.manual_seed(0)  # random numbers drawn around the roots are equal in both runs
        return inputs.cloned().call(model)


def _keep(answers: list[Any], module: nn.Module, args: Any, output: Any) -> None:
    answers.append(cloned(output))  # the code around the root may write to it


def _answering(answers: Sequence[Any]) -> Callable[..., Any]:
    """A forward that gives one answer after another."""
    left = iter(answers)

    def forward(*args: Any, **kwargs: Any) -> Any:
        for answer in left:
            return answer
        raise RuntimeError("a root is called more often than before conversion")

    return forward
