"""What tests of PT2E's programs share: qconfigs, nodes of a site, sabotage, fresh processes."""

from __future__ import annotations

import subprocess
import sys

QCONFIGS = """
[tensor.by-call]
dtype = "uint8"
is_dynamic = true
[qconfig.only]
weight = "weight"
[qconfig.dynamic]
weight = "weight"
activation = "by-call"
"""


def of_site(program, name):
    return next(node for node in program.graph.nodes if node.meta.get("site") == name)


def tamper_with_conversion(monkeypatch, tamper):
    """Let torchao's conversion give a program that ``tamper`` has changed."""
    from qrecipe.execution.pt2e import part

    honest = part.convert_pt2e

    def wrong(prepared):
        made = honest(prepared)
        tamper(made)
        made.recompile()
        return made

    monkeypatch.setattr(part, "convert_pt2e", wrong)


def fresh(code, *given):
    """Run code in a new process; it sees the values as ``given``."""
    prelude = f"import sys, torch\ngiven = {[str(each) for each in given]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
