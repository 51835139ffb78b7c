"""A plan compared with its lock file: what has changed, and the possible causes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from qrecipe.authoring.lock.file import WHOLE, Lock, SiteOutcome, make_lock, read_lock
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
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a plan differs from its lock.

    ``changes`` are changed outcomes; ``causes`` may explain them and are not failures themselves.
    """

    changes: tuple[Change, ...]
    causes: tuple[Change, ...]


def compare(before: Lock, after: Lock) -> Comparison:
    """The changes from one lock to the other."""
    return Comparison(
        changes=(
            *_changes(_classes(before), _classes(after)),
            *outcome_changes(before, after),
        ),
        causes=(
            *_ingredient_changes(before, after),
            *_changes(_versions(before), _versions(after)),
            *_changes(_deciders(before), _deciders(after)),
        ),
    )


def check_lock(plan: Plan, path: Path) -> Comparison:
    """Compare a plan with its lock file; the result has no ``changes``.

    Raises PlanError if an outcome has changed (QR323), the lock belongs to another recipe (QR324),
    or it cannot be read.
    """
    locked, now = read_lock(path), make_lock(plan, path)
    if locked.recipe.name != now.recipe.name:
        message = f"{shown(str(path))} is the lock of {shown(locked.recipe.name)}"
        hint = f"pass that of {shown(now.recipe.name)} with --lock, or write it: qrecipe lock"
        raise PlanError.of("QR324", message, hint=hint)
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


Parts = Mapping[str, "str | None"]


def _changes(before: Mapping[str, Parts], after: Mapping[str, Parts]) -> Iterator[Change]:
    """The parts that differ, of the subjects that both have."""
    for subject, old in before.items():
        new = after.get(subject, old)
        for part in {**old, **new}:
            if old.get(part) != new.get(part):
                yield Change(subject, part, old.get(part), new.get(part))


def _ingredient_changes(before: Lock, after: Lock) -> Iterator[Change]:
    old, new = _ingredients(before), _ingredients(after)
    for name in {**old, **new}:
        if name in old and name in new:
            yield from _changes({name: old[name]}, {name: new[name]})
        else:
            yield Change(name, "", *("extended" if name in names else None for names in (old, new)))


def _ingredients(lock: Lock) -> dict[str, Parts]:
    return {
        f"recipe {each.name}": {
            **each.model_dump(exclude={"name"}),
            "fingerprint": each.fingerprint[:12],
        }
        for each in (lock.recipe, *lock.bases)
    }


def _versions(lock: Lock) -> dict[str, Parts]:
    plugins = {
        f"plugin {name}": {"": f"{plugin.distribution} {plugin.version}"}
        for name, plugin in lock.plugins.items()
    }
    own = {"torch": {"": lock.torch}, "qrecipe": {"": lock.qrecipe}}
    return {
        **own,
        "the model": {"structure": lock.structure[:12]},
        "the plan": {"executor": lock.executor},
        **plugins,
    }


def _classes(lock: Lock) -> dict[str, Parts]:
    """Another class of the same name computes something else, although the specs look the same."""
    return {f"plugin {name}": {"class": plugin.class_} for name, plugin in lock.plugins.items()}


def _deciders(lock: Lock) -> dict[str, Parts]:
    return {name: {"decided by": outcome.by} for name, outcome in lock.sites.items()}


def outcome_changes(before: Lock, after: Lock) -> Iterator[Change]:
    """The changed outcomes: of the plan, of its transforms, then by site.

    They are in the order of ``before``, with new ones last.
    """
    old, new = ({part: str(getattr(lock, part)) for part in WHOLE} for lock in (before, after))
    yield from _changes({"the plan": old}, {"the plan": new})
    for name in {**before.transforms, **after.transforms}:
        then, later = before.transforms.get(name), after.transforms.get(name)
        if then != later:
            yield Change(name, "", then, later)
    for name in {**before.sites, **after.sites}:
        was, now = before.sites.get(name), after.sites.get(name)
        if was is None or now is None:
            yield Change(name, "site", _short(was), _short(now))
            continue
        # what a float site lacks is said by the verdict
        shown = {"op", "verdict"} if was.is_float or now.is_float else None
        # not every executor packs weights for an engine
        hidden = {"by"} if before.executor == after.executor else {"by", "engine"}
        parts = (each.model_dump(include=shown, exclude=hidden) for each in (was, now))
        yield from _changes(*({name: each} for each in parts))


def _short(outcome: SiteOutcome | None) -> str | None:
    return None if outcome is None else f"{outcome.op}, {outcome.verdict}"
