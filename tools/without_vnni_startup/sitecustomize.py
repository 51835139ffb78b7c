"""Python imports this at startup: torch's copy of cpuinfo forgets what `without_vnni` names."""

import ctypes
import os

_library, _, _offsets = os.environ.get("QRECIPE_CPUINFO_CLEARED", "").partition(":")
if _offsets:
    _cpuinfo = ctypes.CDLL(_library)
    _cpuinfo.cpuinfo_initialize()
    _offsets_of_bytes = [int(offset) for offset in _offsets.split(",")]
    _flags = (ctypes.c_ubyte * (max(_offsets_of_bytes) + 1)).in_dll(_cpuinfo, "cpuinfo_isa")
    for _offset in _offsets_of_bytes:
        _flags[_offset] = 0
