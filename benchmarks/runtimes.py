"""What each runtime makes of three models, by `qrecipe.bench`: the tables of docs/which-runtime.md.

The models of benchmarks/executors.py, for batch 1 and 8, in one thread, with random weights: the
times and the distances in dB mean something, the accuracy does not.

    OMP_NUM_THREADS=1 python benchmarks/runtimes.py [--only NAME ...] [--runtimes NAME ...]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

from executors import BATCHES, SIZES, STATIC, SUBJECTS

import qrecipe
from qrecipe.planning.cpu import cpu_name


def benches(name: str, runtimes: Sequence[str] | None) -> list[qrecipe.Bench]:
    subject = SUBJECTS[name]
    model, batches = subject.model(), [subject.batch(8, seed) for seed in range(BATCHES)]
    return [
        qrecipe.bench(model, STATIC, batches, batch_size=size, runtimes=runtimes)  # type: ignore[arg-type]
        for size in SIZES
    ]


def table(name: str, found: Sequence[qrecipe.Bench]) -> str:
    heads = [f"ms, batch {size} | times" for size in SIZES]
    lines = [
        f"| {name} | {' | '.join(heads)} | MB | dB | from plan | int8 sites |",
        "|---|" + "---|" * (2 * len(SIZES) + 4),
    ]
    for rows in zip(*(bench.rows for bench in found), strict=True):
        cells = [cell for row in rows for cell in _time(row)]
        lines.append("| " + " | ".join([rows[0].title, *cells, *_rest(rows[-1])]) + " |")
    return "\n".join(lines)


def _time(row: qrecipe.BenchRow) -> tuple[str, str]:
    if row.time is None or row.speed is None:
        return row.verdict, ""
    return f"{row.time.seconds * 1000:.1f}", f"{row.speed.median:.2f}"


def _rest(row: qrecipe.BenchRow) -> tuple[str, str, str, str]:
    size = "" if row.nbytes is None else f"{row.nbytes / 1e6:.1f}"
    if row.distances is None or row.kernels is None:
        return size, "", "", ""
    near, own, kernels = row.distances.from_reference, row.distances.output, row.kernels
    made = f"{kernels.planned - len(kernels.in_float)}/{kernels.planned}"
    return size, f"{own:.1f}", f"{near:.1f}", made


def main() -> None:
    parser = argparse.ArgumentParser(description="What each runtime makes of a model.")
    parser.add_argument("--only", nargs="*", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--runtimes", nargs="*")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{cpu_name()}\n")
    for name in options.only:
        found = benches(name, options.runtimes)
        print(table(name, found) + "\n")
        for bench in found:
            print("\n".join(bench.notes) + "\n", flush=True)


if __name__ == "__main__":
    main()
