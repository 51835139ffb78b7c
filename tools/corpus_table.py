"""Write docs/corpus.md: what the static recipes do to the architectures of torchvision.

python tools/corpus_table.py       # some minutes; run again where planning or kernels change
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

import qrecipe
from qrecipe.audit.sqnr import output_sqnr_db

ROOT = Path(__file__).parents[1]
PATH = ROOT / "docs" / "corpus.md"
RECIPES = ("x86-static", "arm-static")
BATCHES = 10

sys.path.insert(0, str(ROOT / "tests" / "support"))
from corpus import TORCHVISION, Architecture  # noqa: E402

INTRODUCTION = """\
# The corpus

Every static built-in recipe is run on these architectures of torchvision, once with all sites and
once with a random half of them kept float (`tests/pipeline/test_corpus.py`). (A site is a module, a
fused group, or one call of a function; a passthrough site only moves, reshapes or pools values.)
Each run compares three things with the plan: FX's own
assignment, the classes of the converted model, and every kernel against its float operation on
equal input. `python tools/corpus_table.py` writes this page.

The weights are random, the inputs are small and random too, and the ranges come from {batches} such
batches. **SQNR** is the signal-to-quantization-noise ratio of the output, on a batch that was not
used for calibration. It shows how the noise of {bits} bits accumulates over the depth of an
untrained net, and says nothing about the accuracy of a trained one. **q/dq** counts the quantize
and dequantize nodes of the converted graph: a net that runs in int8 throughout has one quantize for
each input and one dequantize for each output. **Seconds** are CPU time from plan to audit,
calibration included, on one thread.
"""


@dataclass(frozen=True)
class Row:
    name: str
    verdicts: Counter[str]
    reasons: Counter[str]
    quantize: int
    dequantize: int
    sqnr_db: float
    seconds: float


def measure(name: str, architecture: Architecture, recipe: str) -> Row:
    model, batches = architecture.model(), architecture.batches(BATCHES + 1)
    held_out = batches.pop()
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = qrecipe.compile(model, f"builtin:{recipe}", batches[0])
        prepared = compiled.prepare()
        qrecipe.calibrate(prepared, batches, progress=lambda done, total: None)
        converted = compiled.convert(prepared)
    seconds = time.process_time() - started
    floats = [site for site in compiled.plan.sites if site.verdict == "float"]
    quantize, dequantize = boundaries(converted)
    return Row(
        name,
        Counter(site.verdict for site in compiled.plan.sites),
        Counter(general(site.op, site.reason or "") for site in floats),
        quantize,
        dequantize,
        sqnr_of(model, converted, held_out),
        seconds,
    )


def boundaries(converted: fx.GraphModule) -> tuple[int, int]:
    """How many quantize and dequantize nodes there are."""
    targets = [node.target for node in converted.graph.nodes]
    return targets.count(torch.quantize_per_tensor), targets.count("dequantize")


def sqnr_of(model: Any, converted: fx.GraphModule, batch: torch.Tensor) -> float:
    with torch.no_grad():
        found = output_sqnr_db(model(batch), converted(batch))
    assert found is not None
    return found


def general(op: str, reason: str) -> str:
    """The reason without the names of sites, so that equal ones can be counted."""
    if "which returns float" in reason or "which is float" in reason:
        fixed = "its range is fixed" in reason
        return "fixed range after a float producer" if fixed else "follows a float producer"
    if "no quantized kernel" in reason:
        return f"no kernel: {op}"
    return re.sub(r"^\w+'s ", "", reason)


def table(rows: Iterable[Row]) -> str:
    lines = [
        "| architecture | quantized | passthrough | float | q/dq | SQNR (dB) | seconds |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        counts = [str(row.verdicts[verdict]) for verdict in ("quantized", "passthrough", "float")]
        cells = [
            row.name,
            *counts,
            f"{row.quantize}/{row.dequantize}",
            f"{row.sqnr_db:.1f}",
            f"{row.seconds:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def reasons(rows: Iterable[Row]) -> str:
    lines = ["| architecture | why sites stay float |", "|---|---|"]
    for row in rows:
        if row.reasons:
            listed = "; ".join(f"{count} {reason}" for reason, count in row.reasons.most_common())
            lines.append(f"| {row.name} | {listed} |")
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    parts = [INTRODUCTION.format(batches=BATCHES, bits="7 or 8")]
    for recipe in RECIPES:
        rows = []
        for name, architecture in TORCHVISION.items():
            rows.append(measure(name, architecture, recipe))
            print(recipe, name, f"{rows[-1].sqnr_db:.1f} dB", flush=True)
        parts += [f"## builtin:{recipe}\n", table(rows) + "\n", reasons(rows) + "\n"]
    PATH.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
