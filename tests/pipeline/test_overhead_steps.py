"""The steps that benchmarks/overhead.py times by name."""

from __future__ import annotations

import ast
import importlib

from places import ROOT


def test_each_step_is_a_function_that_exists():
    script = ast.parse((ROOT / "benchmarks" / "overhead.py").read_text(encoding="utf-8"))
    (steps,) = (
        ast.literal_eval(statement.value)
        for statement in script.body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "STEPS"
    )
    targets = [target.split(":") for target in steps.values()]
    assert targets
    assert all(callable(getattr(importlib.import_module(module), name)) for module, name in targets)
