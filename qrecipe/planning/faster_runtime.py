"""Where a quantized model is likely to be faster than in torch."""

from __future__ import annotations

from qrecipe.errors.findings import QRecipeError
from qrecipe.planning.cpu import has_vnni
from qrecipe.runtimes.table import RUNTIMES, Name

_FASTER: tuple[Name, ...] = ("openvino", "onnxruntime")
"""With static int8 and one sample, on each net of docs/which-runtime.md; the fastest first."""


def faster_runtime(*, has_convolutions: bool) -> str | None:
    """A note about the fastest runtime that is installed, or None; for models with static sites.

    Without VNNI, OpenVINO was faster for convolutions alone.
    """
    if not (has_convolutions or has_vnni()):
        return None
    for name in _FASTER:
        try:
            RUNTIMES[name].check()
        except QRecipeError:
            continue
        return f"{RUNTIMES[name].title} may run this faster than torch: qrecipe bench measures it"
    return None
