"""The CPU that a model is made for, which may differ from this one."""

from __future__ import annotations

from typing import Literal, get_args

from qrecipe.errors.findings import Finding, UnsupportedError
from qrecipe.errors.spelling import did_you_mean
from qrecipe.errors.text import shown
from qrecipe.planning.cpu import has_vnni
from qrecipe.planning.plan import Plan
from qrecipe.rules.resolution import listed

TargetCpu = Literal["this", "vnni"]
"""``"this"`` is this CPU; ``"vnni"`` is any x86 CPU with VNNI."""


def target_has_vnni(target_cpu: TargetCpu) -> bool:
    """Whether the CPU that a model is made for has VNNI."""
    return target_cpu == "vnni" or has_vnni()


def unjudged_sites(plan: Plan, target_cpu: TargetCpu) -> tuple[str, ...]:
    """The sites whose kernels need VNNI if this CPU has none, so their eighth bit is not checked.

    Raises:
        UnsupportedError: the plan needs VNNI but is for this CPU, which has none (QR318), or the
            target is unknown (QR319).
    """
    if target_cpu not in get_args(TargetCpu):
        allowed = " or ".join(map(shown, get_args(TargetCpu)))
        message = f"target_cpu is {shown(target_cpu)}, but must be {allowed}"
        hint = did_you_mean(str(target_cpu), get_args(TargetCpu))
        raise UnsupportedError.of("QR319", message, hint=hint)
    if not plan.needs_vnni or has_vnni():
        return ()
    if target_cpu == "this":
        raise UnsupportedError.of(
            "QR318",
            f"{_SATURATE}, at {listed(plan.saturating)}",
            hint="limit activations to 7 bits: reduce_range = true, as in builtin:x86-static",
            notes=(
                'or make the model for another CPU: target_cpu="vnni" in Python, '
                "--target-cpu vnni on the command line",
            ),
        )
    return plan.saturating


_SATURATE = "8-bit activations saturate on this CPU, which has no VNNI"


def unjudged_finding(sites: tuple[str, ...]) -> Finding:
    """The warning (QR226) for a model made on a CPU that could not check all of it."""
    return Finding(
        "QR226",
        "8-bit activations saturate on the CPU that converted the model, which has no VNNI: "
        f"checked with 7 bits only: {listed(sites)}",
        hint="evaluate the model on a CPU with VNNI before it is used there",
    )


def saturation_finding() -> Finding:
    """The warning (QR204) that goes with a model for another CPU that is run on this one."""
    hint = "the model was quantized for a CPU with VNNI, so results can differ here"
    return Finding("QR204", _SATURATE, hint=hint)
