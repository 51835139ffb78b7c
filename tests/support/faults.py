"""Interrupts and faults on purpose: kills, full disks, too little memory, long runs.

`tests/pipeline/test_faults.py` tries a few of each, `tools/faults.py` as many as it is told.
"""

from __future__ import annotations

import os
import resource
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import qrecipe

STATIC = "builtin:x86-static"
FEW_BATCHES = qrecipe.parse_recipe(
    f'format = 1\nextends = "{STATIC}"\n[lint]\nignore = ["QR201"]\n'
)
PATIENCE = 60
"""Seconds of CPU time that a child may take."""


@dataclass
class Tally:
    """How often each fault was tried, what it came to, and where it did harm."""

    tried: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def note(self, what: str, end: str, *problems: str) -> None:
        self.tried[what] += 1
        self.ends[f"{what}: {end}"] += 1
        self.failures += [f"{what}: {problem}" for problem in problems]


def in_child(action: Callable[[], object]) -> int:
    """Run it in a fork that writes no core; the status of the child."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        with suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE))
            action()
            status = 0
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
