"""Kills, full disks, too little memory and long runs: what does harm ends it with status 1.

python tools/faults.py [--share 0.1] [--seed 7] [--only kills disks]
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from faults import Tally
from file_faults import full_disks, killed_searches, kills, kinds
from long_runs import many_batches, repeats
from memory_faults import out_of_memory, small_memory

KILLS = 30
FULL_DISKS = 30
FAILING_CALLS = 100
LITTLE_MEMORY = 100
BATCHES = 1000
REPEATS = 200
SUBJECTS = ["kills", "disks", "memory", "runs"]


def subjects(share: float, random: Random) -> dict[str, Callable[[Tally], None]]:
    """What is tried, each at a share of its full number."""

    def times(number: int) -> int:
        return max(1, round(number * share))

    def killed(tally: Tally) -> None:
        killed_searches(times(KILLS), random, tally)
        for kind in kinds():
            kills(kind, times(KILLS), random, tally)

    def disks(tally: Tally) -> None:
        for kind in kinds():
            full_disks(kind, times(FULL_DISKS), random, tally)

    def memory(tally: Tally) -> None:
        for net in ("residual", "mlp"):
            out_of_memory(net, times(FAILING_CALLS), random, tally)
        small_memory(times(LITTLE_MEMORY), random, tally)

    def runs(tally: Tally) -> None:
        many_batches(max(20, times(BATCHES)), tally)
        repeats(max(6, times(REPEATS)), tally)

    return {"kills": killed, "disks": disks, "memory": memory, "runs": runs}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the full number of faults")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a fork has no other threads
    print(f"seed {arguments.seed}; Python {sys.version.split()[0]}, torch {torch.__version__}")
    tally = Tally()
    for name, attempt in subjects(arguments.share, Random(arguments.seed)).items():
        if name in arguments.only:
            attempt(tally)
    for what, number in tally.tried.items():
        ends = {end: n for end, n in tally.ends.items() if end.startswith(f"{what}: ")}
        print(f"{what}: {number:,}")
        for end, count in sorted(ends.items()):
            print(f"  {end.removeprefix(f'{what}: ')}: {count:,}")
    print(*tally.failures, f"{len(tally.failures)} failures", sep="\n")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
