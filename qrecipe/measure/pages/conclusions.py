"""The conclusion of a report, in a sentence: the first thing that its page says."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qrecipe.measure.compare.comparison import Comparison
from qrecipe.measure.drift.report import Drift, moved_text
from qrecipe.measure.profile.report import Profile
from qrecipe.measure.sensitivity.ranking import RankedSite, Ranking

_STANDS_OUT_DB = 3.0
"""Half of the noise: no site is worth staying float for less."""

_STANDS_OUT_SHARE = 0.5
_FEW = 3

_LEAST_LOSS = 0.01
"""The share of the whole time below which a loss is not worth a word."""


def of_ranking(ranking: Ranking) -> str:
    """Which few sites cost the most, if they stand out from the others."""
    if not ranking.sites:
        return "No site has an error of its own."
    worst = ranking.sites[0]
    if not math.isfinite(ranking.values[worst.name]):
        return _without_finite(worst)
    if ranking.float_value is None:
        return _by_db(ranking)
    return _by_measure(ranking, ranking.float_value)


def _without_finite(worst: RankedSite) -> str:
    if worst.sqnr_db == math.inf:
        return "No site has an effect on the output: all are exact."
    return f"Quantizing {worst.name} alone leaves no finite output: leave it float."


def _by_db(ranking: Ranking) -> str:
    about = "about " if ranking.is_estimate else ""
    noise = [10 ** (-ranking.values[site.name] / 10) for site in ranking.sites]
    for count in range(1, min(_FEW, len(noise) - 1) + 1):
        gain = 10 * math.log10(sum(noise) / max(sum(noise[count:]), 1e-300))
        if gain >= count * _STANDS_OUT_DB:
            amount = f"{about}{gain:.0f} dB" if gain < 100 else f"{about}over 100 dB"
            return f"{_cost(ranking.sites[:count], amount)}."
    worst = ranking.sites[0]
    return (
        f"No site stands out: with {worst.name}, the worst, quantized alone, the output has {about}"
        f"{ranking.values[worst.name]:.1f} dB."
    )


def _by_measure(ranking: Ranking, whole: float) -> str:
    losses = [max(0.0, whole - ranking.values[site.name]) for site in ranking.sites]
    for count in range(1, min(_FEW, len(losses)) + 1):
        lost = sum(losses[:count])
        if lost > _STANDS_OUT_SHARE * sum(losses):
            return f"{_cost(ranking.sites[:count], f'{lost:.4g} of {whole:.6g}')}."
    if not any(losses):
        return f"No site alone costs anything of {whole:.6g}."
    worst = ranking.sites[0]
    return (
        f"No site stands out: {worst.name} alone, the worst, costs {losses[0]:.4g} of {whole:.6g}."
    )


def _cost(sites: Sequence[RankedSite], amount: str) -> str:
    """``fc alone costs 9 dB; leave it float``."""
    *others, last = [site.name for site in sites]
    if not others:
        return f"{last} alone costs {amount}; leave it float"
    return f"{', '.join(others)} and {last} together cost {amount}; leave them float"


def of_comparison(report: Comparison) -> str:
    """How far the output is from the float model's, and where it is lost."""
    if report.output is None:
        return "The model has no floating-point output to compare."
    found = _fidelity(report.output.sqnr_db)
    measured = [site for site in report.sites if site.activation is not None]
    if not measured:
        return f"The output {found}."
    worst = measured[0]
    assert worst.activation is not None
    return (
        f"The output {found}; the activation of {worst.name} is farthest from float, "
        f"and {_fidelity(worst.activation.sqnr_db)}."
    )


def _fidelity(sqnr_db: float) -> str:
    if sqnr_db == math.inf:
        return "equals that of the float model"
    return f"has {sqnr_db:.1f} dB" if math.isfinite(sqnr_db) else "is not finite"


def of_profile(profile: Profile) -> str:
    """How much faster the model is, and which site is slower in int8."""
    before, after = 1000 * profile.eager.seconds, 1000 * profile.int8.seconds
    whole = f"int8 takes {after:.3g} ms, float {before:.3g} ms"
    worst = max(profile.sites, key=lambda site: site.loss, default=None)
    if worst is None or worst.loss < _LEAST_LOSS * profile.int8.seconds:
        return f"{whole}; no site loses noticeable time in int8."
    return f"{whole}; {worst.name} loses most in int8, {1000 * worst.loss:.2g} ms."


def of_drift(report: Drift, threshold: float, max_clipped: float) -> str:
    """Whether the stored ranges still fit, and which one does so least."""
    drifted = report.drifted(threshold, max_clipped=max_clipped)
    worst = report.sites[0]
    moves = f"that of {worst.name} ({worst.tensor}) would move by {moved_text(worst)}"
    if not drifted:
        return f"The stored ranges still fit the data: {moves}, and no other by more."
    many = f"{len(drifted)} of {len(report.sites)} stored ranges no longer fit"
    return f"{many}: {moves}. Calibrate again."
