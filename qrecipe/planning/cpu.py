"""The capabilities of this CPU."""

from __future__ import annotations

from typing import Literal

import torch

from qrecipe._torch_versions import cpu_capabilities

CpuClass = Literal["avx512_vnni", "avx512", "avx_vnni", "avx2", "other"]
"""CPUs with the same quantized kernels, named after the widest instructions that torch uses."""

_AVX512 = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq")


def class_of_cpu() -> CpuClass:
    """The class of this CPU; everything that depends on the CPU uses this."""
    has = cpu_capabilities()
    if all(has.get(name) for name in _AVX512):
        return "avx512_vnni" if has.get("avx512_vnni") else "avx512"
    if has.get("avx_vnni"):
        return "avx_vnni"
    return "avx2" if has.get("avx2") else "other"


def has_vnni() -> bool:
    """Whether 8-bit products are added in 32 bits, so that 8-bit activations cannot saturate.

    AVX-VNNI without AVX-512 does not count: FBGEMM, and therefore the x86 engine, does not use it.
    """
    return class_of_cpu() == "avx512_vnni"


def cpu_name() -> str:
    """A short description of the CPU class: ``AVX2 without VNNI``."""
    vnni = "with" if has_vnni() else "without"
    return f"{torch.backends.cpu.get_cpu_capability()} {vnni} VNNI"
