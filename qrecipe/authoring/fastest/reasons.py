"""Why a site is left float, in a few words."""

from __future__ import annotations

from collections.abc import Collection

from qrecipe.authoring.fastest.costs import Costs, SitePrice

_HARDLY = 1.1


def reasons_of(
    costs: Costs, floats: Collection[str], otherwise: str | None = None
) -> dict[str, str]:
    """The reason of each site that needs a rule, the one that loses most in int8 first.

    What follows a float producer is float without a rule. ``otherwise`` is the reason of sites that
    are not slower in int8.
    """
    last = costs.in_channels_last(floats)
    named = costs.needing_a_rule(floats)
    found = []
    for site in costs.sites:
        if site.int8 is None or site.name not in named:
            continue
        in_float = site.channels_last if site.name in last else site.contiguous
        found.append((in_float - site.int8, site.name, _reason(site, in_float, otherwise)))
    return {name: reason for _, name, reason in sorted(found)}


def _reason(site: SitePrice, in_float: float, otherwise: str | None) -> str:
    assert site.int8 is not None
    what, against = site.precision, f"{ms(site.int8)} against {ms(in_float)} ms"
    if site.int8 > in_float * _HARDLY:
        return f"{what} is {_two_digits(site.int8 / in_float)} times slower here: {against}"
    if site.int8 > in_float:
        return f"{what} is no faster here: {against}"
    return (
        otherwise or f"{what} saves {ms(in_float - site.int8)} ms here, and converting costs more"
    )


def ms(seconds: float) -> str:
    """Milliseconds with two digits: ``8.4``, ``0.037``, ``120``."""
    return _two_digits(1000 * seconds)


def _two_digits(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{float(f'{number:.2g}'):g}"
