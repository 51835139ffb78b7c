"""A plan compared with its lock file: what has changed, and the possible causes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qrecipe.authoring.lock.file import Lock, LockedIngredient, make_lock, read_lock
from qrecipe.authoring.lock.outcomes import SiteOutcome
from qrecipe.errors.findings import Finding, PlanError
from qrecipe.errors.text import one_line, shown
from qrecipe.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Change:
    """A part that was ``before`` and is now ``after``; None if it is missing."""

    subject: str
    part: str
    before: str | None
    after: str | None

    def __str__(self) -> str:
        what = f"{self.subject}: {self.part}" if self.part else self.subject
        return f"{what} {self.before or '(none)'} -> {self.after or '(none)'}"

    def to_json(self) -> dict[str, str | None]:
        """The change as plain JSON values, with stable keys."""
        return {
            "subject": self.subject,
            "part": self.part,
            "before": self.before,
            "after": self.after,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a plan differs from its lock.

    ``changes`` are changed outcomes; ``causes`` may explain them and are not failures themselves.
    """

    changes: tuple[Change, ...]
    causes: tuple[Change, ...]


def compare(before: Lock, after: Lock) -> Comparison:
    """The changes from one lock to the other."""
    causes = (
        *_ingredient_changes(before, after),
        *_version_changes(before, after),
        *rule_changes(before, after),
    )
    changes = (*_class_changes(before, after), *outcome_changes(before, after))
    return Comparison(changes, causes)


def check_lock(plan: Plan, path: Path) -> Comparison:
    """Compare a plan with its lock file; the result has no ``changes``.

    Raises PlanError if an outcome has changed (QR323), the lock belongs to another recipe (QR324),
    or it cannot be read.
    """
    locked, now = read_lock(path), make_lock(plan, path)
    if locked.recipe.name != now.recipe.name:
        message = f"{shown(str(path))} is the lock of {shown(locked.recipe.name)}"
        hint = f"pass that of {shown(now.recipe.name)} with --lock, or write it: qrecipe lock"
        raise PlanError(Finding("QR324", message, hint=hint))
    found = compare(locked, now)
    if found.changes:
        raise PlanError(_finding(found, path))
    return found


def _finding(found: Comparison, path: Path) -> Finding:
    subjects = len({change.subject for change in found.changes})
    return Finding(
        "QR323",
        f"the plan differs from {shown(str(path))} in "
        f"{'1 place' if subjects == 1 else f'{subjects} places'}",
        hint="if this is intended, run `qrecipe lock` again and commit the file",
        notes=(
            *(f"  {one_line(str(change))}" for change in found.changes),
            *(["possible causes:"] if found.causes else []),
            *(f"  {one_line(str(cause))}" for cause in found.causes),
        ),
    )


def _ingredient_changes(before: Lock, after: Lock) -> Iterator[Change]:
    old, new = (
        {each.name: each for each in (lock.recipe, *lock.bases)} for lock in (before, after)
    )
    for name in {**old, **new}:
        was, now = _contents(old.get(name)), _contents(new.get(name))
        if was is None or now is None:
            yield Change(f"recipe {name}", "", *(_presence(each) for each in (was, now)))
            continue
        for part in was:
            if was[part] != now[part]:
                yield Change(f"recipe {name}", part, was[part], now[part])


def _contents(ingredient: LockedIngredient | None) -> dict[str, str | None] | None:
    if ingredient is None:
        return None
    values = ingredient.model_dump(exclude={"name"})
    return {**values, "fingerprint": ingredient.fingerprint[:12]}


def _presence(contents: Mapping[str, str | None] | None) -> str | None:
    return None if contents is None else "extended"


def _version_changes(before: Lock, after: Lock) -> Iterator[Change]:
    for name in ("torch", "qrecipe"):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            yield Change(name, "", old, new)
    if before.structure != after.structure:
        yield Change("the model", "structure", before.structure[:12], after.structure[:12])
    for name in sorted(before.plugins.keys() & after.plugins.keys()):
        was, now = before.plugins[name], after.plugins[name]
        versions = [f"{each.distribution} {each.version}" for each in (was, now)]
        if versions[0] != versions[1]:
            yield Change(f"plugin {name}", "", *versions)


def _class_changes(before: Lock, after: Lock) -> Iterator[Change]:
    """Another class of the same name computes something else, although the specs look the same."""
    for name in sorted(before.plugins.keys() & after.plugins.keys()):
        was, now = before.plugins[name].class_, after.plugins[name].class_
        if was != now:
            yield Change(f"plugin {name}", "class", was, now)


def outcome_changes(before: Lock, after: Lock) -> Iterator[Change]:
    """The changed outcomes: of the plan, then by site in the order of ``before``, then new ones."""
    for part in ("backend", "phase", "executor", "boundaries"):
        old, new = str(getattr(before, part)), str(getattr(after, part))
        if old != new:
            yield Change("the plan", part, old, new)
    for name in {**before.sites, **after.sites}:
        if name not in after.sites:
            yield Change(name, "site", _short(before.sites[name]), None)
        elif name not in before.sites:
            yield Change(name, "site", None, _short(after.sites[name]))
        else:
            yield from _part_changes(name, before.sites[name], after.sites[name])


def rule_changes(before: Lock, after: Lock) -> Iterator[Change]:
    """The sites that are now decided by another rule."""
    for name, was in before.sites.items():
        now = after.sites.get(name)
        if now is not None and was.by != now.by:
            yield Change(name, "decided by", was.by, now.by)


def _part_changes(name: str, before: SiteOutcome, after: SiteOutcome) -> Iterator[Change]:
    old, new = before.parts(), after.parts()
    either_is_float = before.is_float or after.is_float  # then the verdict says it all
    for part in ("op", "verdict") if either_is_float else {**old, **new}:
        if old.get(part) != new.get(part):
            yield Change(name, part, old.get(part), new.get(part))


def _short(outcome: SiteOutcome) -> str:
    return f"{outcome.op}, {outcome.verdict}"
