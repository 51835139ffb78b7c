"""A reference conversion compared with the float modules that it was made from.

torch builds new reference modules from the float ones, and may forget to copy something. A
reference that shares a bug with a kernel cannot judge it; and if the backend is only exported, the
reference is the result. The same holds for whatever else conversion changes in a graph: only a run
without rounding shows it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call

from qrecipe._torch_ao import quiet
from qrecipe._torch_fx import ReferenceQuantizedModule
from qrecipe.audit.sample import RIGHT_DB, Sample
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.errors.findings import AuditError
from qrecipe.errors.text import first_line
from qrecipe.execution.fx.emission import erase_marks
from qrecipe.execution.packing import rows_at_once
from qrecipe.model.addresses import site_of
from qrecipe.model.call import bind
from qrecipe.model.interpreter import Interpreter
from qrecipe.model.nested import tensors_in
from qrecipe.model.rewrite_proof import passing
from qrecipe.model.same_graph import observes, same_calls
from qrecipe.model.trace_proof import difference
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.recipe.schema import Phase


def make_judge(reference: fx.GraphModule, prepared: fx.GraphModule) -> None:
    """Make the prepared model's own modules compute instead of reference modules, in place.

    They get the rounded weight. Trained modules round it themselves, with other ties, so they only
    replace a reference module that differs, as in `held`.
    """
    for node in reference.graph.nodes:
        if node.op == "call_module":
            for module, truth in _twins(str(node.target), reference, prepared):
                if isinstance(truth, nn.Module):
                    hook = partial(_check, truth, {}, "")
                    module.register_forward_hook(hook, with_kwargs=True)
                else:
                    vars(module)["forward"] = truth


@contextmanager
def held(reference: fx.GraphModule, prepared: fx.GraphModule) -> Iterator[dict[str, float]]:
    """Check each call of a reference module with the prepared model's own, inside a ``with``.

    It gets the same input and rounded weight; in training, it rounds the weight itself. Sites that
    differ are recorded with their worst SQNR in dB, and the reference continues with the prepared
    module's result.
    """
    wrong: dict[str, float] = {}
    with ExitStack() as hooks:
        for node in reference.graph.nodes:
            if node.op == "call_module":
                name = site_of(node) or str(node.target)
                for module, truth in _twins(str(node.target), reference, prepared):
                    hook = partial(_check, truth, wrong, name)
                    hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        yield wrong


def _twins(
    target: str, reference: fx.GraphModule, prepared: fx.GraphModule
) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """The reference modules that a node calls, each with the module that it should equal."""
    module, own = reference.get_submodule(target), _at(target, prepared)
    inside = {
        name: inner
        for name, inner in module.named_modules(prefix=target)
        if isinstance(inner, ReferenceQuantizedModule)
    }
    if inside and own is not None and hasattr(own, "weight_fake_quant"):
        yield module, _padding_as(next(iter(inside.values())), own)
        return
    for name, inner in inside.items():
        own = _at(name, prepared)
        weight = getattr(own, "weight", None)
        if own is not None and isinstance(weight, Tensor):
            yield inner, partial(_with_rounded_weight, _padding_as(inner, own), weight, inner)


def _at(path: str, model: nn.Module) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _padding_as(reference: nn.Module, own: nn.Module) -> Any:
    """The module without the padding that the graph now does explicitly."""
    mode = getattr(reference, "padding_mode", None)
    if mode is None or mode == getattr(own, "padding_mode", None):
        return own
    bare: Any = copy.copy(own)
    bare.padding, bare.padding_mode = reference.padding, mode
    return bare


def _with_rounded_weight(
    own: nn.Module, weight: Tensor, reference: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    return functional_call(own, {"weight": _rounded(reference, weight)}, args, kwargs)


def _rounded(module: Any, weight: Tensor) -> Tensor:
    """A float weight as the reference module rounds its own, in a fifth of the time."""
    if _has_one_integer_weight(module):
        return _on_grid(weight.detach(), module)
    rounded: Tensor = module.get_weight()
    return rounded


def _check(
    truth: Callable[..., Any],
    wrong: dict[str, float],
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
) -> Any:
    expected = truth(*args, **kwargs)
    if not isinstance(expected, Tensor):
        return None
    if expected.shape == output.shape:
        found = sqnr_db(expected, output)
        unjudgeable = found == -math.inf or not expected.isfinite().all()
        if found >= RIGHT_DB or unjudgeable:
            return None
    else:
        found = math.nan
    wrong[name] = min(found, wrong.get(name, math.inf))
    return expected


_INTEGERS = {torch.qint8: torch.int8, torch.quint8: torch.uint8, torch.qint32: torch.int32}


def _has_one_integer_weight(module: Any) -> bool:
    """Recurrent modules have several weights, embeddings a floating zero point."""
    return (
        isinstance(getattr(module, "weight_scale", None), Tensor)
        and module.weight_dtype in _INTEGERS
        and module.weight_qscheme != torch.per_channel_affine_float_qparams
    )


def _on_grid(weight: Tensor, module: Any) -> Tensor:
    # a zero point in integers would be converted for each weight
    scale, zero_point = module.weight_scale, module.weight_zero_point.to(weight.dtype)
    is_symmetric = not bool(zero_point.any())
    if module.weight_qscheme in (torch.per_channel_affine, torch.per_channel_symmetric):
        shape = [-1 if axis == module.weight_axis_int else 1 for axis in range(weight.dim())]
        scale, zero_point = scale.view(shape), zero_point.view(shape)
    integers = torch.iinfo(_INTEGERS[module.weight_dtype])
    found, rows = torch.empty_like(weight), rows_at_once(weight)
    for start in range(0, len(weight), rows):
        own = slice(start, start + rows)
        by, zero = (x[own] if x.shape[:1] == weight.shape[:1] else x for x in (scale, zero_point))
        steps = (weight[own] / by).round_()
        if is_symmetric:
            steps.clamp_(integers.min, integers.max)
        else:
            steps.add_(zero).clamp_(integers.min, integers.max).sub_(zero)
        torch.mul(steps, by, out=found[own])
    return found


_REFERENCE = "torch.ao.nn.quantized.reference."


def pad_explicitly(reference: fx.GraphModule) -> None:
    """Pad explicitly where the convolutions of a reference model would pad wrongly, in place."""
    for node in list(reference.graph.nodes):
        if node.op != "call_module":
            continue
        for module in reference.get_submodule(str(node.target)).modules():
            if _forgets_its_mode(module):
                _pad_before(node, module)
    reference.recompile()


def _forgets_its_mode(module: nn.Module) -> bool:
    is_reference = type(module).__module__.startswith(_REFERENCE)
    return is_reference and getattr(module, "padding_mode", "zeros") != "zeros"


def _pad_before(node: fx.Node, convolution: Any) -> None:
    widths = tuple(convolution._reversed_padding_repeated_twice)
    with node.graph.inserting_before(node):
        padded = node.graph.call_function(F.pad, (node.args[0], widths, convolution.padding_mode))
    node.update_arg(0, padded)
    convolution.padding = (0,) * len(convolution.kernel_size)
    convolution.padding_mode = "zeros"


def explicit(reference: fx.GraphModule) -> fx.GraphModule:
    """Finish the reference, in place: explicit padding, without our marks."""
    pad_explicitly(reference)
    erase_marks(reference)
    return reference


_ROUNDING = ("quantize_per_", "dequantize")

_FLIPPED = 0.001
"""The share of results that a threshold may flip if sums differ in their last bits."""


def check_conversion(
    reference: fx.GraphModule, prepared: fx.GraphModule, sample: Sample, phase: Phase
) -> None:
    """Check that a reference conversion equals its prepared model, except for rounding.

    Where the graphs are not the same, they are run on ``sample``, which has inputs and outputs of
    the prepared model. Its first samples can prove equality, but not disprove it: a model that
    mixes samples needs all of them.

    Raises ``AuditError`` (QR412) if they differ.
    """
    if same_calls(reference.graph, prepared.graph, _rounds, observes):
        return
    if phase == "qat":  # its fake-quants round
        prepared = passing(prepared)
        with torch.no_grad():
            sample = Sample(sample.inputs, sample.inputs.cloned().call(prepared))
    head = sample.head()
    if head is not None and _difference(reference, prepared, head) is None:
        return
    found = _difference(reference, prepared, sample)
    if found is not None:
        raise AuditError.of(
            "QR412",
            f"torch's conversion changed more than the rounding: {found}",
            hint="leave parts of the model float until it is right, and report the model",
        )


def _difference(reference: fx.GraphModule, prepared: fx.GraphModule, sample: Sample) -> str | None:
    expected = list(tensors_in(sample.output))
    if any(x.is_floating_point() and x.dtype != torch.float32 for x in expected):
        return None  # it ran under autocast, which `around_roots.dtype_findings` reports
    run = _Unrounded(reference, prepared)
    try:
        with torch.no_grad(), quiet():
            actual = run.run(*bind(reference, reference, sample.inputs.cloned()))
    except Exception as error:
        raise_lack_of_memory(error)
        if _fails(reference, sample):
            return None  # it fails with rounding too: the audit reports it
        return f"without rounding it fails: {first_line(error)}"
    return difference(expected, list(tensors_in(actual)), _FLIPPED)


def _fails(reference: fx.GraphModule, sample: Sample) -> bool:
    try:
        with torch.no_grad(), quiet():
            sample.inputs.cloned().call(reference)
    except Exception as error:
        raise_lack_of_memory(error)
        return True
    return False


def _rounds(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target == "dequantize" or (node.target == "to" and torch.float16 in node.args)
    name = str(getattr(node.target, "__name__", node.target))
    return node.op == "call_function" and name.startswith(_ROUNDING)


class _Unrounded(Interpreter):
    """Runs a reference graph with the original float modules and without rounding."""

    def __init__(self, reference: fx.GraphModule, prepared: fx.GraphModule) -> None:
        super().__init__(reference)
        self._float_modules = dict(prepared.named_modules(remove_duplicate=False))

    def run_node(self, n: fx.Node) -> Any:
        return self.env[n.all_input_nodes[0]] if _rounds(n) else super().run_node(n)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: nn.Module = self._float_modules.get(target) or self.fetch_attr(target)
        return module(*args, **kwargs)
