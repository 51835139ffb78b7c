"""onednn's convolutions, which the first call makes fast for the shape of its input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from qrecipe.execution.engine import engine
from qrecipe.execution.packing import packed_convolution, packed_sites
from qrecipe.planning.cpu import has_vnni
from qrecipe.planning.plan import Engine, Plan

_LARGE = 1 << 19
"""The weights of a convolution that takes so long that the rest hardly matters."""


def forget_calls(converted: nn.Module, plan: Plan) -> None:
    """Pack convolutions for onednn again, in place, so that the caller's first call is the first.

    Their packed weights keep the kernel for the shape of the first input. For every other shape
    the kernel is prepared anew in each call, which takes some 35 microseconds.
    """
    engines = plan.engines
    for owner, name, site in _packed(converted):
        packed, own = getattr(owner, name), engines.get(site, plan.backend)
        if not _is_convolution(packed) or not _runs_on_onednn(own):
            continue
        weight, bias = packed.unpack()
        if weight.numel() <= _LARGE:
            with engine(own):
                setattr(owner, name, packed_convolution(packed, weight, bias))


def _packed(converted: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    for module in converted.modules():
        if isinstance(module, fx.GraphModule):
            yield from packed_sites(module)


def _is_convolution(packed: Any) -> bool:
    return str(packed._type().name()).startswith("Conv")


def _runs_on_onednn(own: Engine | str) -> bool:
    """x86 uses it where the CPU has VNNI, for most shapes."""
    return own == "onednn" or (own == "x86" and has_vnni())
