"""Running batches through a prepared model, and checking the resulting ranges."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from qrecipe._torch_ao import FakeQuantizeBase, ObserverBase, quiet
from qrecipe.audit.clipping import GOOD_DB, Clipping, clipping_finding, clipping_of
from qrecipe.audit.farthest_call import Candidates, candidates_kept
from qrecipe.audit.joined_ranges import branch_findings, masked_sums
from qrecipe.audit.moving_averages import (
    LITTLE_WEIGHT,
    MANY_BATCHES,
    Averages,
    first_weight,
    watched,
    weight_text,
)
from qrecipe.audit.ranges import check_ranges, observes
from qrecipe.audit.sample import Sample
from qrecipe.errors.findings import CalibrationError, Finding
from qrecipe.errors.text import counted
from qrecipe.errors.warn import settle, warn
from qrecipe.execution.batches import (
    Forward,
    check_finite,
    check_signature,
    run_batch,
    unusable_batch,
)
from qrecipe.execution.calls import Feed
from qrecipe.execution.failing_observers import failing_observers_named
from qrecipe.execution.fake_quants import only_observing
from qrecipe.execution.prepared import PreparedState, prepared_state, traced_parts
from qrecipe.execution.shards import Turns, check_mergeable, check_same, subjects_in
from qrecipe.model.call import EMPTY, Inputs, given_names, is_empty
from qrecipe.model.copies import empties
from qrecipe.model.nested import cloned
from qrecipe.planning.masked_sums import mask_findings
from qrecipe.process import ranks
from qrecipe.process.neutral import neutral
from qrecipe.recipe.schema import CalibrationTable
from qrecipe.terminal.progress import Progress

FEW_BATCHES = 10
_LABEL = "calibrating"


@neutral
@ranks.together
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
    audit. A model prepared for training gets its initial ranges this way; meanwhile it computes in
    float and eval mode.

    In an initialized process group of torch.distributed, all ranks call it, each with its own
    batches, and all get the ranges of a single process that reads a batch of each rank in turn.
    ``max_batches`` and ``min_batches`` count the batches of all ranks.

    Raises:
        CalibrationError: the model cannot take a batch, or it has NaN or infinity (the message has
            its index); too few batches; observers that saw nothing; ranks with another recipe or
            model, or that failed (QR409). The observers are restored.
        PluginError: an observer does not define how it is merged with those of other ranks (QR157).
    """
    calibrate_checking(prepared, batches, forward, progress, lambda samples: None)


def calibrate_checking(
    prepared: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None,
    progress: Progress | bool | None,
    check: Callable[[Mapping[str, Sample]], None],
) -> None:
    """As `calibrate`; ``check`` is given the first call of each part after the first batch."""
    state = prepared_state(prepared)
    parts = traced_parts(prepared)
    limit = ranks.share(state.calibration.max_batches)
    running = _Running(prepared, state, Feed(batches, forward, limit, progress), check)
    observe = _observed if ranks.count() == 1 else _observed_in_turn
    with (
        _restored_on_error(prepared, state),
        only_observing(prepared),
        torch.no_grad(),
        quiet(),
    ):
        done, averages, candidates = observe(running, parts)
        _check_count(done, state.calibration)
        check_ranges(parts.values())
        clipping = clipping_of(parts, averages, done, candidates, state.samples)
        state.batches, state.first_weight = done, first_weight(averages, done)
        state.clipping = str(clipping) if clipping.shows_below(GOOD_DB) else None
        few = done < FEW_BATCHES and observes(prepared)
        if few:
            warn(_few_batches(state), state.lint.ignore)
        settle(_branches_findings(parts, state.samples), state.lint.ignore)
        masked = [name for part in parts.values() for name in masked_sums(part, state.sums)]
        settle(mask_findings(masked), state.lint.ignore)
        settle(_order_findings(state, clipping, few), state.lint.ignore)


@dataclass(frozen=True, slots=True)
class _Running:
    """A model and the batches of this rank that run through it."""

    prepared: nn.Module
    state: PreparedState
    feed: Feed
    check: Callable[[Mapping[str, Sample]], None]

    def first_time(self) -> Iterator[None]:
        """Run a batch in each step, and keep and check the first calls."""
        for index, batch in self.feed.numbered(_LABEL):
            with _first_calls_kept(self.prepared, self.state) if index == 0 else nullcontext():
                _run(self.prepared, batch, index, self.feed.forward)
            if index == 0:
                self.check(self.state.samples)
            yield

    def again(self) -> Iterator[None]:
        """Run a batch in each step."""
        for index, batch in self.feed.numbered(_LABEL):
            _run(self.prepared, batch, index, self.feed.forward)
            yield


_Parts = Mapping[str, fx.GraphModule]
_Observed = tuple[int, Averages, Mapping[fx.GraphModule, Candidates]]
"""The number of batches, what moving averages saw, and the calls that may show what is clipped."""


def _observed(running: _Running, parts: _Parts) -> _Observed:
    with watched(parts.values()) as averages, candidates_kept(parts.values()) as candidates:
        done = sum(1 for _ in running.first_time())
    return done, averages, candidates


def _observed_in_turn(running: _Running, parts: _Parts) -> _Observed:
    """As `_observed`, by all ranks; each keeps the calls of its own batches."""
    state, subjects = running.state, subjects_in(parts)
    check_same("calibrate", state.fingerprint, running.prepared)
    check_mergeable(subjects, has_merged=state.batches > 0)
    if any(subject.merging == "histogram" for subject in subjects):
        running.feed.hold()
    with candidates_kept(parts.values()) as candidates:
        turns = Turns(subjects, running.first_time, running.again)
    with watched(parts.values()) as averages:
        turns.replay()
    if any(subject.is_averaging for subject in subjects):
        warn(_turns_finding(turns.batches), state.lint.ignore)
    return turns.batches, averages, candidates


def _turns_finding(batches: int) -> Finding:
    """The warning about moving averages over several ranks (QR236)."""
    return Finding(
        "QR236",
        f"moving averages saw the {counted(batches, 'batch')} of {ranks.count()} ranks in turn, "
        "and depend on that order",
        hint='observe with "minmax" or "mean_minmax", which do not depend on it',
    )


def _run(prepared: nn.Module, batch: Any, index: int, forward: Forward | None) -> None:
    with failing_observers_named():
        _run_as_traced(prepared, batch, index, forward)


def _run_as_traced(prepared: nn.Module, batch: Any, index: int, forward: Forward | None) -> None:
    if index == 0 and is_empty(batch):  # a later one is harmless
        raise unusable_batch(batch, index, EMPTY)
    check_finite(batch, index)
    if forward is None:
        check_signature(prepared, batch, index)
    try:
        run_batch(prepared, batch, index, forward)
    except CalibrationError as error:
        hint = None if forward is not None else _other_inputs(prepared, batch)
        if hint is None:
            raise
        raise CalibrationError([replace(each, hint=hint) for each in error.findings]) from error


def _other_inputs(prepared: nn.Module, batch: Any) -> str | None:
    """The hint for a batch of other keyword inputs than the model was traced with."""
    example = prepared_state(prepared).given
    if not example or not isinstance(batch, Mapping):
        return None
    names = given_names(prepared, Inputs.from_batch(batch))
    more = ", ".join(name for name in names if name not in example)
    less = ", ".join(name for name in example if name not in names)
    ways = [f"put {more} into the example inputs too"] * bool(more)
    ways += [f"put {less} into the batches too"] * bool(less)
    if not ways:
        return None
    known = f"the example inputs (of the factory, or the first batch) had {', '.join(example)}"
    return f"{known}, and the model is traced for these: {' and '.join(ways)}"


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
    is_said = few and state.clipping is not None and "QR201" not in state.lint.ignore
    if (clipping.is_narrow and not is_said) or (clipping.is_hidden and not few):
        yield clipping_finding(clipping)
    elif state.qat is not None:
        return  # training continues the averages
    elif state.batches >= MANY_BATCHES and state.clipping is not None:
        yield clipping_finding(clipping)
    elif (finding := order_finding(state)) is not None:
        yield finding


def order_finding(state: PreparedState) -> Finding | None:
    """The warning that the first of several batches weighs much in moving averages (QR234)."""
    weight = state.first_weight or 0.0
    if not FEW_BATCHES <= state.batches < MANY_BATCHES or weight <= LITTLE_WEIGHT:
        return None
    told = f"calibrated on {counted(state.batches, 'batch')}{weight_text(weight)}"
    return Finding(
        "QR234",
        told if state.clipping is None else f"{told}: {state.clipping}",
        hint='use about 100 batches, or observe with "minmax", which does not depend on their '
        "order",
    )


def _branches_findings(
    parts: Mapping[str, fx.GraphModule], samples: Mapping[str, Sample]
) -> Iterator[Finding]:
    for path, part in parts.items():
        if path in samples:
            yield from branch_findings(part, samples[path])
