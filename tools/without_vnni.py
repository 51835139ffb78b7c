"""Run Python as on an x86 CPU that has AVX2 and neither AVX-512 nor VNNI.

    python tools/without_vnni.py -m pytest tests/pipeline/test_cpu.py

torch, FBGEMM, oneDNN and MKL (on CPUs by Intel) then run the kernels of such a CPU, and not merely
what the code believes of it: they saturate, and are slow, where those do. The children of the
process are told the same.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

_STARTUP = Path(__file__).parent / "without_vnni_startup"
_ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
_CPUINFO_SIZE = 128
_FORGOTTEN = ("avx512", "avx10", "avx_vnni", "amx")


def environment() -> dict[str, str]:
    """The environment of a Python that is to believe that it runs on such a CPU."""
    library = Path(torch.__file__).parent / "lib" / "libtorch.so"  # or what it loads: libc10.so
    offsets = ",".join(map(str, _forgotten_offsets(library)))
    path = os.pathsep.join(filter(None, [str(_STARTUP), os.environ.get("PYTHONPATH")]))
    told = {"QRECIPE_CPUINFO_CLEARED": f"{library}:{offsets}", "PYTHONPATH": path}
    return {**os.environ, **_ENVIRONMENT, **told}


def _forgotten_offsets(library: Path) -> Iterator[int]:
    """Where cpuinfo keeps the flags, found by what torch says when one of them is turned over."""
    flags = (ctypes.c_ubyte * _CPUINFO_SIZE).in_dll(ctypes.CDLL(str(library)), "cpuinfo_isa")
    before = _capabilities()
    for offset in range(_CPUINFO_SIZE):
        if flags[offset] != 1:
            continue
        flags[offset] = 0
        after = _capabilities()
        flags[offset] = 1
        if any(name.startswith(_FORGOTTEN) and after[name] != before[name] for name in before):
            yield offset


def _capabilities() -> dict[str, object]:
    cpu = torch._C._cpu
    if hasattr(cpu, "_get_cpu_capability"):
        return dict(cpu._get_cpu_capability())
    asked = [name for name in dir(cpu) if name.startswith("_is_")]  # up to torch 2.10
    return {name.removeprefix("_is_"): getattr(cpu, name)() for name in asked}


def main(arguments: Sequence[str]) -> None:
    os.execve(sys.executable, [sys.executable, *arguments], environment())


if __name__ == "__main__":
    main(sys.argv[1:])
