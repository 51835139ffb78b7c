"""What the CPU at hand can do."""

from __future__ import annotations

import torch


def has_vnni() -> bool:
    """Whether 8-bit products are added in 32 bits, so that 8-bit activations cannot saturate."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


def cpu_name() -> str:
    """The kind of CPU in a few words, as kernels tell them apart: ``AVX2 without VNNI``."""
    vnni = "with" if has_vnni() else "without"
    return f"{torch.backends.cpu.get_cpu_capability()} {vnni} VNNI"
