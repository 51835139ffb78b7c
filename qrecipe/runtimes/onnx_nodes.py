"""The nodes of an exported file in a runtime's report, and the sites that they compute for."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from qrecipe.runtimes.session import Kernel


def in_integers(kernels: Sequence[Kernel], sites: Collection[str]) -> frozenset[str]:
    """Those of the sites that kernels compute in integers."""
    names = {name for kernel in kernels if kernel.is_integer for name in kernel.nodes}
    return frozenset(site for name in names if (site := _site_of(name, sites)) is not None)


_CONVERSION = "quantizelinear"
"""Conversions are named after what they convert, and are no kernels of it."""


def _site_of(name: str, sites: Collection[str]) -> str | None:
    """Nodes are called ``site/Operator``, and runtimes add ``/MatMulAddFusion`` and the like."""
    if _CONVERSION in name.lower():
        return None
    while name not in sites:
        name, slash, _ = name.rpartition("/")
        if not slash:
            return None
    return name
