"""The outcome of a plan for each site, as text that can be stored and compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qrecipe.planning.plan import Plan, Site
from qrecipe.planning.plan_values import spec_values
from qrecipe.planning.text import decided_by
from qrecipe.recipe.schema import Constructor, Phase, Table, TensorSpec
from qrecipe.recipe.tensor_checks import is_static_integer

_DEFAULT_FAKE_QUANT = Constructor(name="fake_quantize")


class SiteOutcome(Table):
    """The outcome for one site; ``by`` names the deciding rule, which does not count as outcome.

    ``input`` says that a float input is quantized first; ``engine`` is set if another engine than
    the backend's packs the weights.
    """

    op: str
    verdict: str
    weight: str | None = None
    activation: str | None = None
    input: str | None = None
    engine: str | None = None
    by: str

    @property
    def is_float(self) -> bool:
        return self.weight is None and self.activation is None

    def parts(self) -> dict[str, str]:
        """The outcome without the rule and without values that are None."""
        return self.model_dump(exclude_none=True, exclude={"by"})


class PlanOutcome(Table):
    """The outcome of a plan; ``boundaries`` counts the tensors quantized or dequantized."""

    backend: str
    phase: str
    executor: str
    boundaries: int
    sites: dict[str, SiteOutcome]


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


def plan_outcome(plan: Plan) -> PlanOutcome:
    """The outcome of a plan, sites in the model's order."""
    return PlanOutcome(
        backend=plan.backend,
        phase=plan.phase,
        executor=plan.executor,
        boundaries=plan.boundaries,
        sites={site.name: _outcome(site, plan.phase) for site in plan.sites},
    )


def outcome_changes(before: PlanOutcome, after: PlanOutcome) -> Iterator[Change]:
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


def rule_changes(before: PlanOutcome, after: PlanOutcome) -> Iterator[Change]:
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


def _outcome(site: Site, phase: Phase) -> SiteOutcome:
    qconfig = site.qconfig
    mode = f" {site.mode}" if site.mode is not None and site.verdict == "quantized" else ""
    return SiteOutcome(
        op=site.op,
        verdict=site.verdict + mode,
        weight=None if qconfig is None else _spec(qconfig.weight, phase),
        activation=None if qconfig is None else _spec(qconfig.activation, phase),
        input=None if site.input is None else "float, quantized here",
        engine=site.engine,
        by=decided_by(site.rule),
    )


def _spec(spec: TensorSpec | None, phase: Phase) -> str | None:
    """A spec in one line: dtype, observer, qscheme, and whatever else is set."""
    if spec is None:
        return None
    values = spec_values(spec)
    observer = None if spec.observer is None else _constructor(spec.observer)
    head = [spec.dtype, observer, spec.qscheme]
    rest = {
        key: value
        for key, value in values.items()
        if key not in ("dtype", "observer", "qscheme", "fake_quant") and value is not False
    }
    words = [word for word in head if word is not None]
    words += [key if value is True else f"{key}={value}" for key, value in rest.items()]
    if phase == "qat" and is_static_integer(spec):
        words.append(f"fake_quant={_constructor(spec.fake_quant or _DEFAULT_FAKE_QUANT)}")
    return " ".join(words)


def _constructor(constructor: Constructor) -> str:
    arguments = ", ".join(f"{key}={value}" for key, value in sorted(constructor.arguments.items()))
    return f"{constructor.name}({arguments})" if arguments else constructor.name
