"""Running batches through a prepared model, and checking the resulting ranges."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from qrecipe._torch_ao import FakeQuantizeBase, ObserverBase, quiet
from qrecipe.audit.clipping import GOOD_DB, Clipping, clipping_finding, clipping_of
from qrecipe.audit.farthest_call import candidates_kept
from qrecipe.audit.joined_ranges import branch_findings
from qrecipe.audit.moving_averages import (
    LITTLE_WEIGHT,
    MANY_BATCHES,
    first_weight,
    watched,
    weight_text,
)
from qrecipe.audit.ranges import observes, range_findings
from qrecipe.audit.sample import Sample
from qrecipe.errors.findings import CalibrationError, Finding
from qrecipe.errors.text import counted
from qrecipe.errors.warn import settle, warn
from qrecipe.execution.batches import (
    Forward,
    check_finite,
    check_signature,
    known_length,
    limited,
    run_batch,
    unusable_batch,
)
from qrecipe.execution.fake_quants import only_observing
from qrecipe.execution.prepared import PreparedState, prepared_state, traced_parts
from qrecipe.model.call import EMPTY, Inputs, is_empty
from qrecipe.model.copies import empties
from qrecipe.model.nested import cloned
from qrecipe.process.neutral import neutral
from qrecipe.recipe.schema import CalibrationTable
from qrecipe.terminal.progress import Progress, chosen_progress

FEW_BATCHES = 10


@neutral
def calibrate(
    prepared: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    progress: Progress | bool | None = None,
) -> None:
    """Run up to ``[calibration] max_batches`` batches through the observers of ``prepared``.

    A batch is a tensor, a tuple or list of positional inputs, or a mapping of keyword inputs;
    ``forward(model, batch)`` handles anything else. The first batch and its output are kept for the
    audit. A model prepared for training computes in float and eval mode meanwhile, to get initial
    ranges.

    Raises:
        CalibrationError: the model cannot take a batch, or it has NaN or infinity (the message has
            its index); too few batches; observers that saw nothing. The observers are restored.
    """
    calibrate_checking(prepared, batches, forward, progress, lambda samples: False)


def calibrate_checking(
    prepared: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None,
    progress: Progress | bool | None,
    check: Callable[[Mapping[str, Sample]], bool],
) -> None:
    """As `calibrate`; ``check`` is given the first call of each part after the first batch.

    It tells whether that shows that samples do not change each other's results.
    """
    state = prepared_state(prepared)
    table = state.calibration
    show = chosen_progress(progress, "calibrating")
    total = known_length(batches, table.max_batches)
    done, are_apart = 0, False
    parts = traced_parts(prepared)
    with (
        _restored_on_error(prepared, state),
        only_observing(prepared),
        torch.no_grad(),
        quiet(),
        watched(parts.values()) as averages,
        candidates_kept(parts.values()) as candidates,
    ):
        for batch in limited(batches, table.max_batches):
            with _first_calls_kept(prepared, state) if done == 0 else nullcontext():
                _run(prepared, batch, done, forward)
            if done == 0:
                are_apart = check(state.samples)
            done += 1
            show(done, total)
        _check_count(done, state.calibration)
        _check_ranges(parts.values())
        clipping = clipping_of(parts, averages, done, candidates, state.samples, are_apart)
        state.batches, state.first_weight = done, first_weight(averages, done)
        state.clipping = str(clipping) if clipping.shows_below(GOOD_DB) else None
        few = done < FEW_BATCHES and observes(prepared)
        if few:
            warn(_few_batches(state), state.lint.ignore)
        settle(_branches_findings(parts, state.samples), state.lint.ignore)
        settle(_order_findings(state, clipping, few), state.lint.ignore)


def _run(prepared: nn.Module, batch: Any, index: int, forward: Forward | None) -> None:
    if index == 0 and is_empty(batch):  # a later one is harmless
        raise unusable_batch(batch, index, EMPTY)
    check_finite(batch, index)
    if forward is None:
        check_signature(prepared, batch, index)
    run_batch(prepared, batch, index, forward)


@contextmanager
def _first_calls_kept(prepared: nn.Module, state: PreparedState) -> Iterator[None]:
    """Record the inputs and outputs of each part, whatever ``forward`` does with a batch."""
    state.samples, state.later_calls, state.whole = {}, {}, None

    def note(path: str, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        inputs = Inputs(args, dict(kwargs))
        if not path:
            state.samples.setdefault(path, Sample(inputs, output))
        elif path in state.samples:
            state.later_calls.setdefault(path, []).append(_own(inputs, output))
        else:
            state.samples[path] = _own(inputs, output)

    def note_whole(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if state.whole is None:
            state.whole = Inputs(args, dict(kwargs)).cloned()

    with ExitStack() as hooks:
        for path in state.parts:
            part = prepared.get_submodule(path)
            hooks.enter_context(part.register_forward_hook(partial(note, path), with_kwargs=True))
        if "" not in state.parts:
            hooks.enter_context(prepared.register_forward_pre_hook(note_whole, with_kwargs=True))
        yield


def _own(inputs: Inputs, output: Any) -> Sample:
    """A copy, because the code around a root may write to both."""
    return Sample(inputs.cloned(), cloned(output))


@contextmanager
def _restored_on_error(prepared: nn.Module, state: PreparedState) -> Iterator[None]:
    noted = state.samples, state.later_calls, state.whole
    observers = [module for module in prepared.modules() if isinstance(module, ObserverBase)]
    saved = [copy.deepcopy(vars(observer), empties([observer])) for observer in observers]
    trained = [module for module in prepared.modules() if isinstance(module, FakeQuantizeBase)]
    weights = [copy.deepcopy(module.state_dict()) for module in trained]
    try:
        yield
    except BaseException:
        for module, tensors in zip(trained, weights, strict=True):
            module.load_state_dict(tensors)
        for observer, attributes in zip(observers, saved, strict=True):
            observer.__dict__.clear()
            observer.__dict__.update(attributes)
        state.samples, state.later_calls, state.whole = noted
        raise


def _check_count(done: int, table: CalibrationTable) -> None:
    if done < table.min_batches:
        raise CalibrationError.of(
            "QR401",
            f"{counted(done, 'batch')} for calibration, but the recipe requires at least "
            f"{table.min_batches}",
            hint="pass more batches, or lower min_batches in [calibration]",
        )


def _few_batches(state: PreparedState) -> Finding:
    """The warning about few batches (QR201), with their effect on moving averages."""
    told, hint = "", "about 100 representative mini-batches are enough"
    if state.first_weight is not None and state.batches > 1:
        told = weight_text(state.first_weight)
    if state.clipping is not None:
        told = f"{told}: {state.clipping}"
        hint = f'{hint}; with these, the observer "minmax" clips nothing'
    return Finding(
        "QR201", f"calibrated on only {counted(state.batches, 'batch')}{told}", hint=hint
    )


def _order_findings(state: PreparedState, clipping: Clipping, few: bool) -> Iterator[Finding]:
    """Warnings about the first batch's influence that QR201 does not cover (QR232 to QR234)."""
    weight = state.first_weight or 0.0
    is_said = few and state.clipping is not None and "QR201" not in state.lint.ignore
    if (clipping.is_narrow and not is_said) or (clipping.is_hidden and not few):
        yield clipping_finding(clipping)
    elif state.qat is not None:
        return  # training continues the averages
    elif state.batches >= MANY_BATCHES and state.clipping is not None:
        yield clipping_finding(clipping)
    elif FEW_BATCHES <= state.batches < MANY_BATCHES and weight > LITTLE_WEIGHT:
        told = f"calibrated on {counted(state.batches, 'batch')}{weight_text(weight)}"
        yield Finding(
            "QR234",
            told if state.clipping is None else f"{told}: {state.clipping}",
            hint='use about 100 batches, or observe with "minmax", which does not depend on their '
            "order",
        )


def _check_ranges(parts: Iterable[fx.GraphModule]) -> None:
    findings = [finding for part in parts for finding in range_findings(part)]
    if findings:
        raise CalibrationError(findings)


def _branches_findings(
    parts: Mapping[str, fx.GraphModule], samples: Mapping[str, Sample]
) -> Iterator[Finding]:
    for path, part in parts.items():
        if path in samples:
            yield from branch_findings(part, samples[path])
