"""The outcome of a plan for a site, as text that can be stored and compared."""

from __future__ import annotations

from qrecipe.planning.plan import Plan, Site
from qrecipe.planning.plan_values import spec_values
from qrecipe.planning.text import decided_by, kept_by, place_of
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


def site_outcome(site: Site, phase: Phase) -> SiteOutcome:
    """The outcome for a site of a plan of this phase."""
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


def transform_outcomes(plan: Plan) -> dict[str, str]:
    """What transforms change, and up to where or in which way."""
    chains = {f"chain {' > '.join(each.sites)}": f"ends: {each.end}" for each in plan.chains}
    groups = {
        f"group {', '.join(each.sites)}": f"divided by {place_of(each)}" for each in plan.groups
    }
    steps = {f"transform {each.name}": f"keeps the outputs {kept_by(each)}" for each in plan.steps}
    return {**chains, **groups, **steps}


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
