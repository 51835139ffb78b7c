"""Each kernel of a converted graph compared with its reference on the same quantized input."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qrecipe._torch_ao import quiet
from qrecipe.audit.float_kernels import expected_output
from qrecipe.audit.modules import EQUAL_INPUT, computes_otherwise
from qrecipe.audit.sample import RIGHT_DB
from qrecipe.audit.sqnr import output_sqnr_db, sqnr_db
from qrecipe.errors.findings import Finding
from qrecipe.errors.text import shown
from qrecipe.model.addresses import observed_name, site_of
from qrecipe.model.call import Inputs, bind
from qrecipe.model.interpreter import Interpreter
from qrecipe.model.moving import PIECE
from qrecipe.planning.plan import Plan, Site
from qrecipe.planning.saturation import ADDS_IN_16_BITS
from qrecipe.recipe.schema import Backend, Phase
from qrecipe.rules.resolution import listed

CLIPPED_DB = 20.0
"""Below this, the clipped part alone is a tenth of a tensor."""

_ALL_CLIPPED_DB = 0.1
"""Below this, nothing is left of a tensor; integers overflow only much further on."""

RANGES_CURE = (
    'observe the activations with "minmax", which keeps the widest range; a moving average needs '
    "more batches that are as wide"
)

_MOST_SEVEN_BITS = 127

_DATA: Mapping[Phase, str] = {
    "ptq": "the first batch goes",
    "qat": "the example inputs go",
}

Limit = Callable[[Tensor], Tensor]
"""A function applied to each quantized tensor before the next kernel reads it."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The SQNR in dB between kernel and reference, for sites that differ by more than rounding.

    ``wrong`` sites differ on any input, ``saturated`` ones only if the input has more than 7 bits;
    ``complete`` tells that every site was compared. ``output_db`` is the SQNR between the outputs
    given equal kernel results; None if it is not available. ``clipped`` are tensors beyond their
    calibrated range, with the SQNR in dB after clipping.
    """

    wrong: Mapping[str, float]
    saturated: Mapping[str, float]
    complete: bool
    output_db: float | None
    clipped: Mapping[str, float]


def judge_sites(
    plan: Plan, converted: fx.GraphModule, reference: fx.GraphModule, inputs: Inputs
) -> Judgement:
    """Run both graphs, the reference on the kernels' results, to compare each site alone.

    Kernels that differ are run again on input that is cut to 7 bits: a kernel that is right then
    adds in 16 bits, and saturates.
    """
    quantized = {site.name: site for site in plan.sites if site.mode is not None}
    run = _run_both(plan, converted, reference, inputs, lambda x: x)
    judged = run.judged
    differ = {
        name: value for name, value in judged.items() if name in quantized and value < RIGHT_DB
    }
    saturated: dict[str, float] = {}
    if any(_may_saturate(quantized[name], plan.backend) for name in differ):
        narrow = _run_both(plan, converted, reference, inputs, _cut_to_seven_bits).judged
        saturated = {
            name: value
            for name, value in differ.items()
            if _may_saturate(quantized[name], plan.backend)
            and narrow.get(name, -math.inf) >= RIGHT_DB
        }
    weighed = {name for name, site in quantized.items() if site.verdict == "quantized"}
    return Judgement(
        wrong={name: value for name, value in differ.items() if name not in saturated},
        saturated=saturated,
        complete=weighed <= judged.keys(),
        # results of other kernels are not passed to the reference
        output_db=run.output_db
        if all(site.mode == "static" for site in quantized.values())
        else None,
        clipped=run.clipped,
    )


def wrong_kernel_findings(plan: Plan, judgement: Judgement) -> Iterator[Finding]:
    """Kernels that compute something else (QR411), or overflow in a useless range (QR404)."""
    for site in plan.sites:
        if site.name not in judgement.wrong:
            continue
        if judgement.clipped.get(site.name, math.inf) < _ALL_CLIPPED_DB:
            yield _useless_range(site)
            continue
        found_db = judgement.wrong[site.name]
        yield computes_otherwise(site, "the quantized kernel", f"{found_db:.1f} dB", EQUAL_INPUT)


def _useless_range(site: Site) -> Finding:
    activation = None if site.qconfig is None else site.qconfig.activation
    observer = None if activation is None else activation.observer
    named = "" if observer is None else f" ({shown(observer.name)})"
    return Finding(
        "QR404",
        f"the observer of {site.name}{named} gives a range that is far too narrow: nearly all "
        "values are clipped, and their integers overflow in the kernel",
        site.rule.location,
        hint="fix that observer, or name another one; does it compute its scale from the range?",
    )


def saturation_findings(
    plan: Plan, judgement: Judgement, may_saturate: Collection[str]
) -> Iterator[Finding]:
    """Kernels that saturate (QR416), by cause: 8 bits in the recipe, or data beyond the ranges.

    Those of ``may_saturate`` are for a CPU on which they do not saturate.
    """
    by_cause: tuple[dict[str, float], dict[str, float]] = {}, {}
    for name, found_db in judgement.saturated.items():
        if name not in may_saturate:
            by_cause[name not in plan.saturating][name] = found_db
    causes = (
        (
            "kernels saturate on this CPU, which adds pairs of 8-bit products in 16 bits",
            "limit the activations that they read to 7 bits: reduce_range = true",
        ),
        (
            f"{_DATA[plan.phase]} beyond the calibrated range of the inputs of these sites, and "
            "their kernels saturate there on this CPU",
            RANGES_CURE,
        ),
    )
    locations = {site.name: site.rule.location for site in plan.sites}
    for found, (cause, cure) in zip(by_cause, causes, strict=True):
        if found:
            worst = min(found.values())
            yield Finding(
                "QR416",
                f"{cause}: {listed(tuple(found))}, {worst:.1f} dB from the reference at worst",
                locations[next(iter(found))],
                hint=cure,
            )


def _may_saturate(site: Site, backend: Backend) -> bool:
    return (
        site.mode == "static"
        and site.qconfig is not None
        and site.qconfig.weight is not None
        and (site.engine or backend) in ADDS_IN_16_BITS
    )


def _cut_to_seven_bits(x: Tensor) -> Tensor:
    if x.dtype != torch.quint8 or x.qscheme() != torch.per_tensor_affine:
        return x
    codes = x.int_repr().clamp(max=_MOST_SEVEN_BITS)
    zero_point = min(x.q_zero_point(), _MOST_SEVEN_BITS)  # kernels pad with it
    cut: Tensor = torch._make_per_tensor_quantized_tensor(codes, x.q_scale(), zero_point)
    return cut


@dataclass(frozen=True, slots=True)
class _Run:
    """SQNR in dB of each site's kernel against its reference on equal input, and of the output."""

    judged: dict[str, float]
    output_db: float | None
    clipped: dict[str, float]


def _run_both(
    plan: Plan,
    converted: fx.GraphModule,
    reference: fx.GraphModule,
    inputs: Inputs,
    limit: Limit,
) -> _Run:
    """Run both graphs on one input; the reference continues with the results of the kernels."""
    collector = _Collector(converted, reference, plan.backend, limit)
    followers = {site.name for site in plan.sites if site.verdict == "passthrough"}
    with torch.no_grad(), quiet():
        actual = collector.run(*bind(converted, converted, inputs))
        replay = _Replay(reference, collector.results, limit, followers)
        expected = replay.run(*bind(reference, reference, inputs))
    return _Run(
        {**replay.judged, **collector.judged}, output_sqnr_db(expected, actual), replay.clipped
    )


_Key = tuple[str, Any]
"""The name of a site, and the number of its result if it gives several."""


def _key(node: Any) -> _Key | None:
    name = site_of(node) if isinstance(node, fx.Node) else None
    return None if name is None else (name, node.meta.get(PIECE))


class _Collector(Interpreter):
    """Keeps the outputs of static sites by name, and compares the other sites right away."""

    def __init__(
        self,
        converted: fx.GraphModule,
        reference: fx.GraphModule,
        backend: Backend,
        limit: Limit,
    ) -> None:
        super().__init__(converted)
        self.reference = reference
        self.backend = backend
        self.limit = limit
        self.results: dict[_Key, Tensor] = {}
        self.judged: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        key = _key(n)
        if not isinstance(result, Tensor):
            return result
        if result.is_quantized:
            if key is not None:
                # a later in-place operation must not change it
                self.results[key] = result.clone()
            return self.limit(result)
        if key is not None and n.op == "call_module":
            self._note_untraced_range(key[0], n, result)
        return result

    def _note_untraced_range(self, name: str, n: fx.Node, result: Tensor) -> None:
        """Compare the output of a dynamic or weight-only module with what it should be."""
        inputs = Inputs(*self.fetch_args_kwargs_from_env(n))
        kernel = self.module.get_submodule(str(n.target))
        compute = self.reference.get_submodule(str(n.target))
        expected = expected_output(kernel, compute, inputs, self.backend)
        if expected is not None:
            self.judged[name] = sqnr_db(expected, result)


class _Replay(Interpreter):
    """Runs the reference but continues with the kernels' results, to compare each site alone."""

    def __init__(
        self,
        reference: fx.GraphModule,
        results: dict[_Key, Tensor],
        limit: Limit,
        followers: Collection[str],
    ) -> None:
        super().__init__(reference)
        self.results = results
        self.limit = limit
        self.followers = followers
        self.judged: dict[str, float] = {}
        self.clipped: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is not torch.quantize_per_tensor:
            return result
        before: Tensor = self.fetch_args_kwargs_from_env(n)[0][0]
        self._note_clipping(n, before, result)
        key = _key(n.args[0])
        kernel = None if key is None else self.results.get(key)
        if key is None or kernel is None or kernel.shape != result.shape:
            return self.limit(result)
        if key[0] in self.followers:
            result = _on_grid_of(kernel, before)
        found = (
            math.inf
            if _one_step_apart(result, kernel)
            else sqnr_db(result.dequantize(), kernel.dequantize())
        )
        self.judged[key[0]] = min(found, self.judged.get(key[0], math.inf))
        limited: Tensor = self.limit(kernel)
        return limited

    def _note_clipping(self, n: fx.Node, before: Tensor, result: Tensor) -> None:
        left = sqnr_db(before, _cut_to_range_of(result, before))
        if left < CLIPPED_DB:
            self.clipped[observed_name(n)] = left


def _cut_to_range_of(quantized: Tensor, x: Tensor) -> Tensor:
    """A float tensor clipped to the codes of a quantized one, without rounding."""
    codes = torch.iinfo(quantized.int_repr().dtype)
    scale, zero_point = quantized.q_scale(), quantized.q_zero_point()
    return x.clamp((codes.min - zero_point) * scale, (codes.max - zero_point) * scale)


def _on_grid_of(kernel: Tensor, x: Tensor) -> Tensor:
    """A float tensor, rounded as a kernel that follows its input does.

    A product with a number scales the grid of its input, and so that of all that follow it. In the
    reference, all have the grid of the observer that they share.
    """
    on_grid: Tensor = torch.quantize_per_tensor(
        x, kernel.q_scale(), kernel.q_zero_point(), kernel.dtype
    )
    return on_grid


def _one_step_apart(result: Tensor, kernel: Tensor) -> bool:
    """Whether two tensors on one grid differ by at most one step: ties that rounded differently."""
    same_grid = (
        result.q_scale() == kernel.q_scale() and result.q_zero_point() == kernel.q_zero_point()
    )
    if not same_grid:
        return False
    steps = result.int_repr().to(torch.int16) - kernel.int_repr().to(torch.int16)
    return bool((steps.abs() <= 1).all())
