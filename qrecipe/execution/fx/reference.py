"""A reference conversion compared with the float modules that it was made from.

torch builds new reference modules from the float ones, and may forget to copy something. A
reference that shares a bug with a kernel cannot judge it; and if the backend is only exported, the
reference is the result.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from qrecipe._torch_fx import ReferenceQuantizedModule
from qrecipe.audit.sample import RIGHT_DB
from qrecipe.audit.sqnr import sqnr_db
from qrecipe.execution.fx.reference_weights import quantized_weight
from qrecipe.model.addresses import site_of


@dataclass(frozen=True, slots=True)
class Held:
    """The findings of the hooks of `hold`: ``wrong`` is the worst SQNR in dB by site."""

    wrong: dict[str, float] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)

    def release(self) -> None:
        for handle in self.handles:
            handle.remove()


def make_judge(reference: fx.GraphModule, prepared: fx.GraphModule) -> None:
    """Make the prepared model's own modules compute instead of reference modules, in place.

    They get the rounded weight. Trained modules round it themselves, with other ties, so they only
    replace a reference module that differs, as in `hold`.
    """
    for node in reference.graph.nodes:
        if node.op == "call_module":
            for module, truth in _twins(str(node.target), reference, prepared):
                if isinstance(truth, nn.Module):
                    hook = partial(_check, truth, {}, "")
                    module.register_forward_hook(hook, with_kwargs=True)
                else:
                    vars(module)["forward"] = truth


def hold(reference: fx.GraphModule, prepared: fx.GraphModule) -> Held:
    """Check each call of a reference module with the prepared model's own module.

    It gets the same input and rounded weight; in training, it rounds the weight itself. Differences
    are recorded, and the reference continues with the prepared module's result.
    """
    held = Held()
    for node in reference.graph.nodes:
        if node.op != "call_module":
            continue
        name = site_of(node) or str(node.target)
        for module, truth in _twins(str(node.target), reference, prepared):
            hook = partial(_check, truth, held.wrong, name)
            held.handles.append(module.register_forward_hook(hook, with_kwargs=True))
    return held


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
    return functional_call(own, {"weight": quantized_weight(reference, weight)}, args, kwargs)


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
