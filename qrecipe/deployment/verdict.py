"""What a runtime computes, compared with the reference of the plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qrecipe.audit.modules import EQUAL_INPUT, computes_otherwise
from qrecipe.audit.sample import CAUSE_DB, JUDGEABLE_DB, RIGHT_DB, TOLERANCE_DB
from qrecipe.audit.sqnr import db_text, output_sqnr_db
from qrecipe.deployment.job import Planned
from qrecipe.errors.findings import Finding
from qrecipe.planning.cpu import has_vnni
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.rules.resolution import listed


@dataclass(frozen=True, slots=True)
class Distances:
    """SQNR in dB: of an output against the reference, and of both against float.

    None where there is no floating tensor, or no plan.
    """

    from_reference: float | None
    output: float | None
    reference: float | None

    @property
    def text(self) -> str:
        given = (self.from_reference, self.output, self.reference)
        near, own, planned = ("?" if each is None else db_text(each) for each in given)
        return (
            f"{near} dB from the plan's reference; against float {own} dB, "
            f"the reference {planned} dB"
        )


def distances(output: Any, planned: Planned | None, in_float: Any) -> Distances:
    own = output_sqnr_db(in_float, output)
    if planned is None:
        return Distances(None, own, None)
    return Distances(output_sqnr_db(planned.output, output), own, planned.sqnr_db)


SitesAlone = Callable[[], Mapping[str, float]]
"""What the kernel of each site reaches in dB, given what the site reads in the plan."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is wrong with a runtime; ``farthest`` is the farthest site alone, if any was judged."""

    findings: tuple[Finding, ...] = ()
    farthest: tuple[str, float] | None = None


def verdict_of_float(title: str, found: Distances) -> Verdict:
    """Whether a runtime computes what the float model computes (QR414)."""
    if found.output is None or found.output >= RIGHT_DB:
        return Verdict()
    return Verdict((_otherwise(title, f"the float model: {found.output:.1f} dB from it"),))


def verdict_of(title: str, found: Distances, planned: Planned, alone: SitesAlone | None) -> Verdict:
    """What is wrong with the kernels of a runtime (QR411, QR416), or with its output (QR414).

    An output that is near the reference, or as near to float as that, is right. Otherwise the
    sites are judged alone, since single results that are rounded the other way add up in deep
    models. If all are right, the runtime may not be the main cause of the error against float.
    """
    if _agrees(found):
        return Verdict()
    dbs = _judged(alone)
    sites = {site.name: site for site in planned.compiled.plan.sites}
    wrong = {name: value for name, value in dbs.items() if name in sites and not value >= RIGHT_DB}
    if wrong:
        return Verdict(tuple(_wrong_kernels(title, wrong, planned)))
    farthest = min(dbs.items(), key=lambda each: each[1]) if dbs else None
    is_main_cause = _is_judgeable(found) and not _loss(found) <= CAUSE_DB
    return Verdict(
        (_otherwise(title, f"the plan: {found.text}"),) if is_main_cause else (), farthest
    )


def _agrees(found: Distances) -> bool:
    near, own, expected = found.from_reference, found.output, found.reference
    if near is None or own is None or expected is None:
        return True  # integers, which flip at ties
    return near >= RIGHT_DB or (_is_judgeable(found) and _loss(found) <= TOLERANCE_DB)


def _is_judgeable(found: Distances) -> bool:
    """Whether the plan is near enough to float to tell; NaN is never right."""
    assert found.output is not None
    assert found.reference is not None
    return found.reference >= JUDGEABLE_DB or math.isnan(found.output)


def _loss(found: Distances) -> float:
    assert found.output is not None
    assert found.reference is not None
    return found.reference - found.output


def _judged(alone: SitesAlone | None) -> Mapping[str, float]:
    if alone is None:
        return {}
    try:
        return alone()
    except Exception as error:  # of the exporter or the runtime: the output decides
        raise_lack_of_memory(error)
        return {}


def _wrong_kernels(title: str, wrong: Mapping[str, float], planned: Planned) -> Iterator[Finding]:
    """Those that saturate on this CPU are one finding."""
    plan = planned.compiled.plan
    saturated = [] if has_vnni() else [name for name in wrong if name in plan.saturating]
    if saturated:
        worst = min(wrong[name] for name in saturated)
        yield Finding(
            "QR416",
            f"kernels of {title} saturate on this CPU, which adds pairs of 8-bit products in 16 "
            f"bits: {listed(saturated)}, {worst:.1f} dB from the plan at worst",
            hint="limit the activations that they read to 7 bits: reduce_range = true",
        )
    for site in plan.sites:
        if site.name in wrong and site.name not in saturated:
            what = f"the kernel of {title}"
            yield computes_otherwise(site, what, f"{wrong[site.name]:.1f} dB", EQUAL_INPUT)


def _otherwise(title: str, what: str) -> Finding:
    return Finding(
        "QR414",
        f"{title} computes something other than {what}",
        hint="use another runtime, or leave parts of the model float until it is right there",
    )
