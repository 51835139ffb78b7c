"""Hostile input until the time is up: what leaks, hangs or eats memory ends it with status 1.

python tools/fuzz.py --seconds 1200 [--seed 7] [--only recipes]

Each case comes from a seed of its own, which is printed where it fails:
python tools/fuzz.py --only recipes --case 123456789
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

import torch

import qrecipe
from qrecipe.authoring.lock.file import lock_text, make_lock
from qrecipe.planning.cpu import has_vnni

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))
import hostile  # noqa: E402
import hostile_artifacts  # noqa: E402
from guarded import SMOOTH, store_guarded  # noqa: E402
from nets import NETS  # noqa: E402
from watched import forbidden, watched  # noqa: E402

SECONDS_A_FILE = 2.0
"""CPU time that a file may take."""

MEMORY = 512 * 2**20
"""Bytes that the process may grow by, from its size when all is loaded."""

SHOWN_FAILURES = 20

SUBJECTS = ("recipes", "references", "globs", "artifacts", "attacks", "transforms", "locks")

Case = Callable[[Random, Path], hostile.Outcome]


@dataclass
class Tally:
    """What the cases of one subject came to; ``slowest`` is CPU seconds a file, and its seed."""

    cases: int = 0
    files: int = 0
    findings: Counter[str] = field(default_factory=Counter)
    slowest: tuple[float, int] = (0.0, 0)
    failures: list[str] = field(default_factory=list)


def subjects(folder: Path) -> dict[str, Case]:
    """What is attacked, each with a sound file to start from."""
    model, batches = NETS["mlp"].model(), NETS["mlp"].batches()
    recipe = qrecipe.load_recipe("builtin:x86-static")
    path = folder / "good.safetensors"
    qrecipe.save_quantized(qrecipe.quantize(model, recipe, batches, progress=False), path)
    plan = qrecipe.plan(model, recipe, batches[0])
    lock = lock_text(make_lock(plan, folder / "recipe.lock"))
    guarded = store_guarded(folder / "guarded.safetensors")
    smoothed = store_guarded(folder / "smoothed.safetensors", SMOOTH)

    def load(path: Path) -> object:
        return qrecipe.load_quantized(path, model)

    return {
        "recipes": hostile.recipe_case,
        "references": hostile.reference_case,
        "globs": hostile.pattern_case,
        "artifacts": partial(hostile_artifacts.artifact_case, good=path.read_bytes(), load=load),
        "attacks": partial(hostile_artifacts.attack_case, good=guarded.read_bytes()),
        "transforms": partial(hostile_artifacts.attack_case, good=smoothed.read_bytes()),
        "locks": partial(hostile.lock_case, good=lock),
    }


def run(name: str, case: Case, seed: int, folder: Path, tally: Tally) -> None:
    """One case: its findings and time, or its failure."""
    started = time.process_time()
    try:
        with watched() as events:
            found = case(Random(seed), folder)
    except Exception:
        tally.failures.append(f"{name} --case {seed}\n{traceback.format_exc(limit=-6)}")
        return
    seconds = (time.process_time() - started) / found.files
    tally.cases += 1
    tally.files += found.files
    tally.findings.update(found.codes)
    tally.slowest = max(tally.slowest, (seconds, seed))
    if seconds > SECONDS_A_FILE:
        tally.failures.append(f"{name} --case {seed}: {seconds:.2f} s")
    # the cases write their files themselves, and rebuilding a sound model runs FX's code for it
    seen = [event for event in events if not _is_of_the_case(event, folder)]
    if name not in ("artifacts", "attacks", "transforms") and (
        odd := forbidden(seen, *(folder / each for each in ("tree", "alone", "recipe.lock")))
    ):
        tally.failures.append(f"{name} --case {seed}: {odd[:3]}")


def _is_of_the_case(event: tuple[str, tuple[object, ...]], folder: Path) -> bool:
    kind, arguments = event
    path = str(arguments[0])
    is_planted = kind in ("open", "os.mkdir", "os.symlink") and path.startswith(str(folder))
    is_outside = path.startswith((str(folder / "secret.toml"), str(folder / "outside")))
    is_written = kind != "open" or "w" in str(arguments[1])
    return (is_planted and is_written) or (is_planted and not is_outside) or kind == "os.symlink"


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(tallies: dict[str, Tally], seconds: float, start: int) -> list[str]:
    for name, tally in tallies.items():
        slowest, seed = tally.slowest
        print(f"\n{name}: {tally.cases:,} cases, {tally.files:,} files")
        print(f"  slowest: {slowest:.3f} s of CPU a file (--only {name} --case {seed})")
        print("  " + ", ".join(f"{code} {count:,}" for code, count in tally.findings.most_common()))
    failures = [failure for tally in tallies.values() for failure in tally.failures]
    grown = peak_bytes() - start
    if grown > MEMORY:
        failures.append(f"the process grew by {grown / 2**20:.0f} MiB")
    cases = sum(tally.cases for tally in tallies.values())
    print(f"\n{cases:,} cases in {seconds:.0f} s; {len(failures)} failures")
    print(f"memory: peak {peak_bytes() / 2**20:.0f} MiB, {grown / 2**20:.0f} MiB of it since start")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--only", choices=SUBJECTS)
    parser.add_argument("--case", type=int, help="run one case again")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"seed {arguments.seed}; Python {sys.version.split()[0]}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        cases = subjects(folder)
        cases = {only: cases[only] for only in [arguments.only] if only} or cases
        tallies = {name: Tally() for name in cases}
        has_vnni()  # what is asked of the system once
        for name, case in cases.items():
            run(
                name,
                case,
                arguments.case or 0,
                folder,
                Tally() if arguments.case is None else tallies[name],
            )
        start, started = peak_bytes(), time.monotonic()
        draw = Random(arguments.seed)
        ends = started + (arguments.seconds if arguments.case is None else 0)
        while (
            time.monotonic() < ends
            and sum(len(t.failures) for t in tallies.values()) < SHOWN_FAILURES
        ):
            # equal time for each, not equal cases: a glob takes microseconds
            for name, case in cases.items():
                turn = min(ends, time.monotonic() + 1)
                while time.monotonic() < turn:
                    run(name, case, draw.getrandbits(48), folder, tallies[name])
        failures = report(tallies, time.monotonic() - started, start)
    for failure in failures[:SHOWN_FAILURES]:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
