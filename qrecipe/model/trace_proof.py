"""Records what each node of a traced graph computes, and proves that the graph is the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe.errors.findings import Finding, PlanError, TraceError
from qrecipe.errors.text import first_line
from qrecipe.model.call import Inputs, bind, on_few
from qrecipe.model.changes import is_in_place
from qrecipe.model.copies import runnable_copy
from qrecipe.model.dry_run import (
    changed_argument,
    drawing_nothing,
    first_change,
    state_of,
    try_out,
    unusable,
    version,
    versions_of,
)
from qrecipe.model.interpreter import Interpreter
from qrecipe.model.masks import has_mask
from qrecipe.model.nested import as_real, container_of, parts_of, tensors_in
from qrecipe.model.unfit import all_finite, unfit
from qrecipe.process.warnings import held_back

_RELATIVE_TOLERANCE = 1e-3
_FEW = 4096
_WITH_INFINITY = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Value:
    """What a node computes: ``is_float`` for floating-point tensors, also in a tuple.

    ``is_tensor`` is False for tuples, sizes and numbers. ``rank`` is the number of dimensions of a
    tensor, ``count`` that of the results in a tuple; ``is_input`` tells that it is the node's first
    input, unchanged; ``is_finite`` is False if it has infinite values. ``shape`` is that of the
    example's few samples, where they were run. ``is_masked`` tells that one of its two inputs is a
    mask.
    """

    is_float: bool
    is_tensor: bool
    rank: int | None = field(default=None, compare=False)
    is_input: bool = field(default=False, compare=False)
    is_finite: bool = field(default=True, compare=False)
    count: int | None = field(default=None, compare=False)
    shape: tuple[int, ...] | None = field(default=None, compare=False)
    is_masked: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Example:
    """A few samples, and the output of the caller's model for them."""

    inputs: Inputs
    output: Any


def record_values(graph_module: fx.GraphModule, model: nn.Module, inputs: Inputs) -> Example:
    """Run the graph once and record in each node's ``meta["value"]`` what it computes.

    The caller's model must compute the same on these samples: tracing loses what it cannot see,
    such as a change through a view, or a branch on ``self.training``. The samples and the output
    are returned, to compare all later graphs with.

    Raises ``PlanError``: the model does not accept the inputs (QR307); or it computes something
    other than its graph, draws random numbers, or writes to its inputs or its state (QR306).
    """
    few, expected = _outputs(model, inputs)
    args = bind(graph_module, model, few.cloned())
    try:
        # what the model itself warns of was said when it ran
        with torch.no_grad(), held_back([("", Warning)]):
            actual = _Recorder(graph_module).run(*args)
    except Exception as error:
        raise _different(f"does not run: {first_line(error)}", model) from error
    found = difference(expected, actual)
    if found is not None:
        raise _different(f"computes something other than the model: {found}", model)
    return Example(few.cloned(), expected)


def _outputs(model: nn.Module, inputs: Inputs) -> tuple[Inputs, Any]:
    """The first samples, or all if the model needs them, and its output for them."""
    try:
        return on_few(inputs, lambda few: (few, _output(model, few)))
    except PlanError:
        raise
    except Exception as error:
        raise unusable(error) from error


def _output(model: nn.Module, inputs: Inputs) -> Any:
    probe, given = runnable_copy(model), inputs.cloned()
    versions, state = versions_of(model, given), state_of(probe)
    with drawing_nothing():
        output = try_out(probe, given, model)
    argument = changed_argument(model, given, versions)
    if argument is not None:
        raise unfit(
            f'the model\'s forward changes its input "{argument}" in place',
            "the quantized model would not: change a copy instead, x = x.sub(0.5)",
        )
    written = first_change(state, state_of(probe))
    if written is not None:
        raise _unproven(
            f"the model's forward writes to {written}, which its graph would not",
            "return the value instead, or quantize the parts around the module that keeps it: "
            "[fx] roots",
        )
    return output


def _unproven(message: str, hint: str, *notes: str) -> TraceError:
    """The traced graph is not the model, or lacks what its forward writes (QR306)."""
    return TraceError(unfit(message, hint, *notes).findings)


class DifferentGraphError(TraceError):
    """A graph does not compute what the model computes (QR306)."""


_GRAPH = "the traced graph"


def of_export(error: DifferentGraphError) -> Finding:
    """The finding about what torch.export made of a model that cannot be traced."""
    (finding,) = error.findings
    return replace(
        finding,
        message=finding.message.replace(_GRAPH, "the program that torch.export makes", 1),
        hint="torch.export follows Python code, such as a loop over the samples of a batch, as the "
        "example inputs take it: compute with whole tensors, for any number of samples",
        notes=(),
    )


def _different(message: str, model: nn.Module) -> DifferentGraphError:
    """The error with what tracing may have missed: a difference does not show its cause."""
    own = [m for m in model.modules() if not type(m).__module__.startswith("torch.nn")]
    leave_out = "or leave the module inside that does so out: [fx] non_traceable_module_name"
    causes = [
        *([_HOOKS] if model._forward_hooks or model._forward_pre_hooks else []),
        "tracing may have taken another branch: isinstance(x, torch.Tensor) and "
        "torch.is_grad_enabled() differ in it; remove the branch, or ask for "
        "isinstance(x, (tuple, list))",
    ]
    error = _unproven(
        f"{_GRAPH} {message}",
        *causes,
        "or it lost an in-place change through a view or an alias (y = x; y += 1), or "
        "whatever depends on data: write it out of place",
        *([leave_out] if any(module is not model for module in own) else []),
    )
    return DifferentGraphError(error.findings)


_HOOKS = (
    "hooks of the model itself run around its forward, and are not traced: do in forward what they "
    "change, or register them on the quantized model"
)


class _Recorder(Interpreter):
    """Records values; what changes a tensor in place changes a copy, as in a quantized graph."""

    def run_node(self, n: fx.Node) -> Any:
        sources = {source: self.env[source] for source in n.all_input_nodes}
        versions = {source: version(value) for source, value in sources.items()}
        tensors = {each: value for each, value in sources.items() if isinstance(value, Tensor)}
        copies = {each: x.clone() for each, x in tensors.items() if x.numel() <= _FEW}
        if is_in_place(n):
            changed: Any = n.args[0]
            if isinstance(sources[changed], Tensor):
                self.env[changed] = sources[changed].clone()
        first = self.env[n.all_input_nodes[0]] if sources else None
        before = version(first)
        result = super().run_node(n)
        for source, value in sources.items():
            if versions[source] == version(value):
                continue
            # torch 2.10 counts statistics that are only read as changed
            if source not in copies or not bool((copies[source] == value).all()):
                raise RuntimeError(f"{n.name} changes a tensor that it is given")
        self.env.update(sources)
        is_input = is_same(result, first) and version(first) == before
        value = _describe(result, is_input)
        n.meta["value"] = replace(value, is_masked=_has_mask(sources.values()))
        return result


def _has_mask(values: Collection[Any]) -> bool:
    """Whether these are two float tensors, and one is a mask."""
    floats = [x for x in values if isinstance(x, Tensor) and _has_ends(x)]
    return len(floats) == 2 and has_mask(float(end) for x in floats for end in x.aminmax())


def _has_ends(x: Tensor) -> bool:
    return _is_plain(x) and x.dtype in _WITH_INFINITY and bool(x.numel())


def is_same(value: Any, other: Any) -> bool:
    """Whether two values are one tensor, or the same view of one memory."""
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return False
    if not _is_plain(value) or not _is_plain(other) or not value.numel():
        return value is other
    own, others = (
        (each.data_ptr(), each.dtype, each.shape, each.stride()) for each in (value, other)
    )
    return own == others


def _is_plain(x: Tensor) -> bool:
    """Whether it has sizes and strides."""
    return x.layout == torch.strided and not x.is_nested and not is_wrapped(x)


def is_wrapped(value: Any) -> bool:
    """Whether a value is what a transform of torch.func, such as vmap, gives for a tensor."""
    return isinstance(value, Tensor) and bool(
        torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def _describe(value: Any, is_input: bool) -> Value:
    if isinstance(value, Tensor) and value.is_nested:  # it has no sizes, and few kernels
        return Value(value.is_floating_point(), True, value.dim(), is_input)
    if isinstance(value, Tensor):
        may_overflow = value.dtype in _WITH_INFINITY and not all_finite(value)
        is_finite = not (may_overflow and bool(value.isinf().any()))
        is_float, shape = value.is_floating_point(), tuple(value.shape)
        return Value(is_float, True, len(shape), is_input, is_finite, shape=shape)
    count = len(value) if isinstance(value, (tuple, list)) else None
    return Value(any(x.is_floating_point() for x in tensors_in(value)), False, count=count)


def difference(expected: Any, actual: Any, share: float = 0.0) -> str | None:
    """Where two outputs differ by more than rounding, including containers and their types.

    In each tensor, up to ``share`` of the elements may differ by any amount.
    """
    if _kind(expected) is not _kind(actual):
        return f"returns a {_kind(actual).__name__} instead of a {_kind(expected).__name__}"
    if isinstance(expected, Tensor):
        return None if _close(expected, actual, share) else "a tensor differs"
    parts, others = parts_of(expected), parts_of(actual)
    if parts is not None and others is not None:
        if list(parts) != list(others):
            if isinstance(expected, Mapping):
                return "the keys of the result differ"
            return "the number of results differs"
        compare = partial(difference, share=share)
        return next(filter(None, map(compare, parts.values(), others.values())), None)
    if isinstance(expected, (bool, int, str)) and expected != actual:
        return f"returns {actual!r} instead of {expected!r}"
    return None


def _kind(value: Any) -> type:
    return Tensor if isinstance(value, Tensor) else container_of(value)


def _close(a: Tensor, b: Tensor, share: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = as_real(a), as_real(b)
    if a.is_floating_point():
        largest = float(a.nan_to_num(0, 0, 0).abs().max()) if a.numel() else 0.0
        tolerance = _RELATIVE_TOLERANCE * largest
        off = ~torch.isclose(a, b, rtol=_RELATIVE_TOLERANCE, atol=tolerance, equal_nan=True)
    else:
        off = a != b
    return int(off.sum()) <= share * off.numel()
