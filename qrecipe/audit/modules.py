"""The modules of a converted model compared with the plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qrecipe._torch_fx import QuantizedEmbedding, QuantizedSoftmax
from qrecipe.errors.findings import Finding
from qrecipe.observers.qconfig import torch_dtype
from qrecipe.planning.plan import Site
from qrecipe.recipe.patterns import leave_float


def take_any_layout(model: nn.Module) -> None:
    """Make the inputs of some modules contiguous, in place.

    The kernels of quantized embeddings require it. qnnpack's softmax is wrong without it.
    """
    for module in model.modules():
        if isinstance(module, (QuantizedEmbedding, QuantizedSoftmax)):
            module.register_forward_pre_hook(_make_contiguous, with_kwargs=True)


def _make_contiguous(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(map(_contiguous, args)), {name: _contiguous(arg) for name, arg in kwargs.items()}


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def forget_qconfigs(model: nn.Module) -> None:
    """Remove torch's qconfigs from the modules: the caller's, or those that have been applied."""
    for module in model.modules():
        vars(module).pop("qconfig", None)


def weight_problem(
    site: Site,
    module: nn.Module | None,
    kinds: Mapping[int, tuple[torch.dtype, torch.qscheme]],
) -> str | None:
    """How the weight of a converted module differs from its site's plan.

    ``kinds`` has the dtype and scheme of packed weights by their ``id``; others are unpacked.
    """
    spec = site.qconfig.weight if site.qconfig else None
    weight_of = getattr(module, "weight", None)
    if spec is None or not callable(weight_of):
        return None
    packed = getattr(module, "_packed_params", None)
    if id(packed) in kinds:
        dtype, scheme = kinds[id(packed)]
    else:
        weight = weight_of()
        if not weight.is_quantized:  # float16, which unpacks to float32
            stored = getattr(packed, "dtype", weight.dtype)
            return None if stored == torch_dtype(spec) else f"has {stored} weights"
        dtype, scheme = weight.dtype, weight.qscheme()
    per_channel = str(scheme).startswith("torch.per_channel")
    wants_per_channel = (spec.qscheme or "per_tensor").startswith("per_channel")
    if dtype != torch_dtype(spec):
        return f"has weights of dtype {dtype}"
    if per_channel != wants_per_channel:
        return f"has {scheme} weights"
    return None


def differs(site: Site, expected: str, what: str) -> Finding:
    """The finding (QR410) about a site that did not become what was planned."""
    return Finding(
        "QR410",
        f"{site.name} ({site.op}) is planned as {expected}, but {what}",
        site.rule.location,
        hint=f"decided by {site.rule.tier} {site.rule.key}".rstrip(),
    )


EQUAL_INPUT = "its reference on the same input"


def computes_otherwise(site: Site, what: str, distance: str, like: str) -> Finding:
    """The finding (QR411) about a site whose ``what`` computes something other than ``like``."""
    return Finding(
        "QR411",
        f"{what} of {site.name} ({site.op}) computes something else: {distance} from {like}",
        site.rule.location,
        hint=leave_float(site.name),
    )
