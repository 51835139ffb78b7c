"""What differs between versions of torch: the tested ones, the warning, what some of them lack.

The names that a recipe may use are in `registry/torch_names.json`, with those that a version lacks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from qrecipe.errors.findings import Finding
from qrecipe.errors.warn import warn

TESTED_TORCH = ("2.10", "2.11", "2.12", "2.13", "2.14", "2.15")
"""The supported minor versions of torch; docs/versions.md says what was tested with each."""


def warn_if_untested(version: str) -> None:
    """Warn (QR200) where ``version`` of torch is not a supported one."""
    minor = ".".join(version.split(".")[:2])
    if minor in TESTED_TORCH:
        return
    finding = Finding(
        "QR200",
        f"torch {version} is outside the tested range ({TESTED_TORCH[0]} to {TESTED_TORCH[-1]})",
        hint="plans and audits may fail; install a tested version if they do",
    )
    warn(finding, ignore=())


def cpu_capabilities() -> Mapping[str, object]:
    """The instruction sets of this CPU by torch's names, as ``torch.cpu.get_capabilities``.

    Versions without that function only tell of AVX2, of AVX-512 as torch's kernels need it, and of
    AVX512-VNNI.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    avx512 = torch.cpu._is_avx512_supported()
    parts = dict.fromkeys(("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"), avx512)
    vnni = torch.cpu._is_vnni_supported()
    return {"avx2": torch.cpu._is_avx2_supported(), **parts, "avx512_vnni": vnni}


def rewrites_statistics(module: nn.Module) -> bool:
    """Whether a module writes its statistics back in eval mode, changed by rounding at most.

    torch 2.10's instance norm does: the mean of one copy for each sample of the batch.
    """
    is_norm = isinstance(module, nn.modules.instancenorm._InstanceNorm)
    return is_norm and not module.training and torch.__version__.startswith("2.10.")
