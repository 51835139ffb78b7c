"""Recipes in your own test suite: compare a plan with a golden file.

from qrecipe.testing import assert_plan_matches

def test_the_plan_stays_as_it_was():
    assert_plan_matches(Net().eval(), RECIPE, example_inputs, HERE / "golden" / "net.txt")
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from qrecipe.authoring.lock.file import SiteOutcome, site_outcome
from qrecipe.errors.findings import CODES, RecipeReferenceError
from qrecipe.errors.text import first_line
from qrecipe.files import write_atomically
from qrecipe.pipeline import plan as make_plan
from qrecipe.planning.plan import Plan, Site
from qrecipe.planning.text import decided_by, summary
from qrecipe.recipe.recipe import Recipe, load_recipe

UPDATE_VARIABLE = "QRECIPE_UPDATE_GOLDEN"
"""An environment variable: ``1`` rewrites the golden files."""


def assert_plan_matches(
    model: nn.Module,
    recipe: Recipe | str | os.PathLike[str],
    example_inputs: Any,
    golden: str | os.PathLike[str],
    *,
    update: bool | None = None,
) -> Plan:
    """Compare the plan of a recipe for a model with a golden file, and return the plan.

    The file has the outcome of every site and every rule, without line numbers and machine paths:
    comments and the order of keys don't count. With ``update`` (default: whether the environment
    has ``QRECIPE_UPDATE_GOLDEN=1``) it is rewritten instead.

    Raises:
        AssertionError: the plan differs, or there is no golden file.
        QRecipeError: no plan could be made, or the file cannot be written.
    """
    __tracebackhide__ = True
    loaded, path = load_recipe(recipe), Path(golden)
    plan = make_plan(model, loaded, example_inputs)
    text = golden_text(plan, _name(loaded, plan, path))
    if os.environ.get(UPDATE_VARIABLE) == "1" if update is None else update:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            text = f"cannot write {path}: {first_line(error)}"
            raise RecipeReferenceError.of("QR001", text) from error
        write_atomically(path, text)
    elif (expected := _content(path)) != text:
        raise AssertionError(_difference(path, expected, text))
    return plan


def golden_text(plan: Plan, recipe: str) -> str:
    """The text of a plan in a golden file, with ``recipe`` as the recipe's name.

    Columns are not aligned, so that only lines that differ in meaning differ.
    """
    rules = (
        f"{decided_by(each.rule)}: {each.verdict}, sites: {len(each.sites)}"
        for each in sorted(plan.rules, key=lambda each: (each.rule.tier, each.rule.key))
    )
    parts = [
        summary(replace(plan, recipe=recipe)),
        *("\n".join(_site_lines(site, site_outcome(site, plan.phase))) for site in plan),
        "\n".join(rules),
        *(f"{finding.code} {CODES[finding.code].title}" for finding in plan.warnings),
    ]
    return "\n\n".join(parts) + "\n"


def _site_lines(site: Site, outcome: SiteOutcome) -> Iterator[str]:
    parts = outcome.parts()
    yield f"{site.name}: {parts.pop('op')}"
    yield f"    {parts.pop('verdict')}, decided by {outcome.by}"
    for part, text in parts.items():
        yield f"    {part} {text}"
    if site.reason is not None:
        yield f"    why: {site.reason}"


def _name(recipe: Recipe, plan: Plan, golden: Path) -> str:
    """A recipe's file relative to the golden file's folder."""
    if recipe.path is None:
        return plan.recipe
    return Path(os.path.relpath(recipe.path, golden.parent)).as_posix()


def _content(path: Path) -> str:
    __tracebackhide__ = True
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        why = "no such file"
    except (OSError, ValueError) as error:
        why = (getattr(error, "strerror", None) or str(error)).lower()
    raise AssertionError(f"cannot read the golden plan {path}: {why}\n{_ADVICE}")


def _difference(path: Path, expected: str, text: str) -> str:
    old, new = expected.splitlines(), text.splitlines()
    lines = difflib.unified_diff(old, new, "golden", "the plan now", lineterm="", n=4)
    endings = ["the lines are equal, but the line endings differ"] if old == new else []
    return "\n".join([f"the plan differs from {path}", *endings, *lines, _ADVICE])


_ADVICE = (
    f"run the tests with {UPDATE_VARIABLE}=1 to write the current plan, "
    "and review the difference before you commit it"
)
