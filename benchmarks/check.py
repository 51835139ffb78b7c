"""CPU time of ``qrecipe check`` compared with importing the packages that it needs.

    python benchmarks/check.py        # status 1 if it takes more than LIMIT times as long

Both run in turn as fresh processes, so that other load on the machine affects both alike.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASELINE = ("-c", "import pydantic, typer, rich")
CHECK = ("-m", "qrecipe", "check", "recipes/x86-static.toml")
WARM_UP = 2
RUNS = 15
LIMIT = 3.0


def main() -> int:
    """Print both medians and their ratio."""
    times: dict[Sequence[str], list[float]] = {BASELINE: [], CHECK: []}
    for run in range(WARM_UP + RUNS):
        for command, taken in times.items():
            seconds = cpu_seconds(command)
            if run >= WARM_UP:
                taken.append(seconds)
    baseline, check = (statistics.median(taken) for taken in times.values())
    for command, seconds in ((BASELINE, baseline), (CHECK, check)):
        print(f"{seconds * 1000:6.1f} ms CPU  python {' '.join(command)}")
    print(f"ratio {check / baseline:.2f}, at most {LIMIT:g} wanted (medians of {RUNS} runs each)")
    return 0 if check <= LIMIT * baseline else 1


def cpu_seconds(arguments: Sequence[str]) -> float:
    """User and system time of a Python process, which must succeed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


if __name__ == "__main__":
    sys.exit(main())
