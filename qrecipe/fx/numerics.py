"""The numeric audit: the converted model against torch's own reference of it, on one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from qrecipe._torch_ao import quiet
from qrecipe.dynamic_kernels import expected_output
from qrecipe.errors import Finding, first_line
from qrecipe.fx.emission import site_of
from qrecipe.fx.weights import round_weights_fast
from qrecipe.inputs import Inputs, batch_size, bind, head
from qrecipe.planning import Plan, Site
from qrecipe.rules import rule_for
from qrecipe.schema import Backend
from qrecipe.sqnr import output_sqnr_db, sqnr_db

RIGHT_KERNEL_DB = 30.0
"""Below this a kernel and its reference compute different things from one quantized input."""

JUDGEABLE_DB = 15.0
"""Below this an output says nothing about kernels: the reference is as far from float itself."""

TOLERANCE_DB = 1.0

HEAD_SAMPLES = 4
"""As many samples of the first batch prove a model; where they don't, all of it is used."""

DYNAMIC_TOLERANCE_DB = TOLERANCE_DB + 20 * math.log10(2)
"""The dynamic kernels take 7 bits of their input, their reference 8."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One batch and what the prepared (float) model made of it."""

    inputs: Inputs
    output: Any

    def head(self) -> Sample | None:
        """The first samples with their part of the output; None where there is no such part."""
        inputs = self.inputs.first_samples(HEAD_SAMPLES)
        size = batch_size((self.inputs.args, dict(self.inputs.kwargs)))
        if inputs is self.inputs or batch_size(self.output) != size:
            return None
        return Sample(inputs, head(self.output, HEAD_SAMPLES))

    def __deepcopy__(self, memo: dict[int, Any]) -> Sample:
        # it travels in the model's meta, and a copy of the model needs no copy of the data
        return self


@dataclass(frozen=True, slots=True)
class ReferenceRun:
    """A sample and what the reference conversion makes of it; ``error`` where it fails.

    ``whole`` is the sample that it is the head of, to be tried where the head proves nothing.
    """

    sample: Sample
    sqnr_db: float | None
    error: str | None = None
    whole: Sample | None = None


def run_on_head(reference: fx.GraphModule, sample: Sample) -> ReferenceRun:
    """As `run_reference`, on the first samples alone where the batch can be cut."""
    part = sample.head()
    if part is None:
        return run_reference(reference, sample)
    return replace(run_reference(reference, part), whole=sample)


def run_reference(reference: fx.GraphModule, sample: Sample) -> ReferenceRun:
    """Run the reference conversion on the sample; the model computes the same afterwards."""
    round_weights_fast(reference)
    try:
        with torch.no_grad(), quiet():
            output = sample.inputs.call(reference)
    except Exception as error:
        return ReferenceRun(sample, None, first_line(error))
    return ReferenceRun(sample, output_sqnr_db(sample.output, output))


def numeric_findings(
    plan: Plan,
    converted: fx.GraphModule,
    proof: ReferenceRun,
    make_reference: Callable[[], fx.GraphModule],
) -> Iterator[Finding]:
    """What the numbers of one batch say: wrong kernels, a worse model, a doubtful scheme."""
    if not any(site.mode for site in plan.sites):
        return
    if proof.whole is not None:
        if not _head_agrees(plan, converted, proof):
            proof = run_reference(make_reference(), proof.whole)
            yield from numeric_findings(plan, converted, proof, make_reference)
        return
    sample, reference_db = proof.sample, proof.sqnr_db
    if proof.error is not None:
        yield _does_not_run("reference", proof.error)
        return
    try:
        with torch.no_grad(), quiet():
            lowered_db = output_sqnr_db(sample.output, sample.inputs.call(converted))
    except Exception as error:
        yield _does_not_run("converted model", first_line(error))
        return
    if _agree(plan, reference_db, lowered_db):
        return
    judgement = _judge_sites(plan, converted, make_reference(), sample)
    yield from judgement.wrong
    if judgement.wrong or reference_db is None or lowered_db is None:
        return
    if math.isnan(lowered_db) or (reference_db >= JUDGEABLE_DB and not judgement.complete):
        yield _worse(reference_db, lowered_db)
    elif lowered_db < JUDGEABLE_DB:
        yield (_unlike_training if plan.phase == "qat" else _coarse)(reference_db, lowered_db)


def _head_agrees(plan: Plan, converted: fx.GraphModule, proof: ReferenceRun) -> bool:
    """Whether the first samples prove the model; a failure on them says nothing of the batch."""
    try:
        with torch.no_grad(), quiet():
            output = proof.sample.inputs.call(converted)
    except Exception:
        return False
    return proof.error is None and _agree(
        plan, proof.sqnr_db, output_sqnr_db(proof.sample.output, output)
    )


def _agree(plan: Plan, reference_db: float | None, lowered_db: float | None) -> bool:
    """Whether the outputs prove the kernels right; outputs without floats prove nothing."""
    if reference_db is None or lowered_db is None:
        return False
    dynamic = any(site.mode == "dynamic" for site in plan.sites)
    tolerance = DYNAMIC_TOLERANCE_DB if dynamic else TOLERANCE_DB
    # the reference can be the worse one: it ignores padding_mode, and saturates where the kernel
    # of an operation with a number finds a scale of its own
    return lowered_db >= reference_db - tolerance and max(reference_db, lowered_db) >= JUDGEABLE_DB


def _worse(reference_db: float, lowered_db: float) -> Finding:
    return Finding(
        "QR412",
        f"the converted model reaches {lowered_db:.1f} dB against float on the first batch, "
        f"its reference {reference_db:.1f} dB",
        hint="some kernels could not be judged one by one; try another backend",
    )


def _coarse(reference_db: float, lowered_db: float) -> Finding:
    return Finding(
        "QR203",
        f"only {lowered_db:.1f} dB against float on the first batch; no kernel is wrong, and the "
        f"reference conversion gives {reference_db:.1f} dB: the scheme is too coarse",
        hint="find the sites that hurt, leave them float or give them another observer",
    )


def _unlike_training(reference_db: float, lowered_db: float) -> Finding:
    return Finding(
        "QR203",
        f"only {lowered_db:.1f} dB between the trained model and the converted one, on the example "
        f"inputs or the first batch of calibration; no kernel is wrong, and the reference "
        f"conversion gives {reference_db:.1f} dB",
        hint="evaluate the converted model: with reduce_range training clips where int8 kernels do "
        "not, and inputs unlike the data tell little; compile with a batch of data",
    )


_WANT_BATCHES = ("Input shape must be `(N, C", "dimension of input tensor should be larger")
"""What torch's quantized kernels say to an input without a batch dimension."""


def _does_not_run(what: str, error: str) -> Finding:
    hint = "leave the operation that fails float, and report the model"
    if any(text in error for text in _WANT_BATCHES):
        hint = (
            "quantized kernels want a batch dimension, where float ones do without: x.unsqueeze(0)"
        )
    return Finding("QR413", f"the {what} fails on the first batch: {error}", hint=hint)


class _Collector(fx.Interpreter):
    """Keeps what each static site gives, by its name, and judges the others at once."""

    def __init__(self, converted: fx.GraphModule, backend: Backend) -> None:
        super().__init__(converted)
        self.backend = backend
        self.results: dict[str, Any] = {}
        self.judged: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        name = site_of(n)
        if name is None or not isinstance(result, Tensor):
            return result
        if result.is_quantized:
            # a later operation in place must not change what is judged
            self.results[name] = result.clone()
        elif n.op == "call_module":
            self._note_untraced_range(name, n, result)
        return result

    def _note_untraced_range(self, name: str, n: fx.Node, result: Tensor) -> None:
        """What a dynamic or weight-only module gives, beside what it should."""
        inputs = Inputs(*self.fetch_args_kwargs_from_env(n))
        kernel = self.module.get_submodule(str(n.target))
        expected = expected_output(kernel, inputs, self.backend)
        if expected is not None:
            self.judged[name] = sqnr_db(expected, result)


class _Replay(fx.Interpreter):
    """Runs the reference, but goes on from what the kernels gave: each site alone is judged."""

    def __init__(self, reference: fx.GraphModule, results: dict[str, Any]) -> None:
        super().__init__(reference)
        self.results = results
        self.judged: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is not torch.quantize_per_tensor:
            return result
        source = n.args[0]
        name = site_of(source) if isinstance(source, fx.Node) else None
        kernel = self.results.get(name) if name is not None else None
        if kernel is None or kernel.shape != result.shape:
            return result
        self.judged[str(name)] = (
            math.inf
            if _one_step_apart(result, kernel)
            else sqnr_db(result.dequantize(), kernel.dequantize())
        )
        return kernel


def _one_step_apart(result: Tensor, kernel: Tensor) -> bool:
    """Whether two tensors on one grid differ by a step at most: ties that rounded otherwise."""
    same_grid = (
        result.q_scale() == kernel.q_scale() and result.q_zero_point() == kernel.q_zero_point()
    )
    if not same_grid:
        return False
    steps = result.int_repr().to(torch.int16) - kernel.int_repr().to(torch.int16)
    return bool((steps.abs() <= 1).all())


def _is_finer(site: Site) -> bool:
    """Whether the kernel keeps the scale of its input, and its reference rounds to a coarser one.

    So does a product with a number; and dropout, whose range of training has what it scaled up.
    """
    return site.verdict == "passthrough" and (site.op == "mul" or "dropout" in site.op.lower())


@dataclass(frozen=True, slots=True)
class _Judgement:
    """What single sites gave on equal input; ``complete`` where no site was left out."""

    wrong: tuple[Finding, ...]
    complete: bool


def _judge_sites(
    plan: Plan, converted: fx.GraphModule, reference: fx.GraphModule, sample: Sample
) -> _Judgement:
    collector = _Collector(converted, plan.backend)
    with torch.no_grad(), quiet():
        collector.run(*bind(converted, converted, sample.inputs))
        replay = _Replay(reference, collector.results)
        replay.run(*bind(reference, reference, sample.inputs))
    quantized = {site.name: site for site in plan.sites if site.mode is not None}
    judged = {**replay.judged, **collector.judged}
    wrong = [
        Finding(
            "QR411",
            f"the quantized kernel of {name} ({quantized[name].op}) computes something else: "
            f"{value:.1f} dB from its reference on equal input",
            quantized[name].rule.location,
            hint=f'leave it float: [rules.module_name] {rule_for(name)} = "float"',
        )
        for name, value in judged.items()
        if name in quantized and value < RIGHT_KERNEL_DB and not _is_finer(quantized[name])
    ]
    weighed = {name for name, site in quantized.items() if site.verdict == "quantized"}
    return _Judgement(tuple(wrong), weighed <= judged.keys())
