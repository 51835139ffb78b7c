"""Running data through a prepared model, with every batch checked."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.data import Dataset

from qrecipe._torch_ao import FakeQuantizeBase, ObserverBase, quiet
from qrecipe.assembly import PreparedState, prepared_state
from qrecipe.averages import first_weight, watched
from qrecipe.branches import branch_findings
from qrecipe.clipping import GOOD_DB, clipping_finding, clipping_of, farthest_kept
from qrecipe.copying import structural_copy
from qrecipe.errors import CalibrationError, Finding, PlanError, counted, first_line
from qrecipe.fx.numerics import Sample
from qrecipe.fx.training import only_observing
from qrecipe.inputs import EMPTY, Inputs, is_empty
from qrecipe.linting import warn
from qrecipe.nested import cloned, parts_of, tensors_in
from qrecipe.neutral import neutral
from qrecipe.progress import Progress, terminal_progress
from qrecipe.ranges import observes, range_findings
from qrecipe.remedies import Remedy, remedy
from qrecipe.schema import CalibrationTable
from qrecipe.trials import CANNOT_TAKE
from qrecipe.unfit import check_is_model

Forward = Callable[[nn.Module, Any], Any]
"""Runs a model on one batch of the caller's loader."""

FEW_BATCHES = 10
_DESCRIBED = 4
_NO_MORE = object()


@neutral
def calibrate(
    prepared: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> None:
    """Run up to ``[calibration] max_batches`` batches through the observers of ``prepared``.

    A batch is a tensor, a tuple or list of positional inputs, or a mapping of keyword inputs;
    ``forward(model, batch)`` handles anything else. The first batch and its output stay with the
    model for the audit. What was prepared for training sees float values meanwhile, in eval mode:
    ranges to start from.

    Raises:
        CalibrationError: a batch that the model cannot take or with NaN or infinity, named by its
            index; too few batches; observers that saw nothing. The observers are then as before.
    """
    state = prepared_state(prepared)
    table = state.calibration
    show = progress or terminal_progress("calibrating")
    total = known_length(batches, table.max_batches)
    done = 0
    parts = _traced_parts(prepared, state)
    with (
        _restored_on_error(prepared, state),
        only_observing(prepared),
        torch.no_grad(),
        quiet(),
        watched(parts.values()) as averages,
        farthest_kept(parts.values(), averages) as farthest,
    ):
        for batch in limited(batches, table.max_batches):
            with _first_calls_kept(prepared, state) if done == 0 else nullcontext():
                _run(prepared, batch, done, forward)
            done += 1
            show(done, total)
        _check_count(done, state.calibration)
        _check_ranges(parts.values())
        clipping = clipping_of(parts, averages, done, farthest, state.samples)
        state.batches, state.first_weight = done, first_weight(averages, done)
        state.clipping = str(clipping) if clipping.shows_below(GOOD_DB) else None
        few = done < FEW_BATCHES and observes(prepared)
        if few:
            warn(_few_batches(state), state.lint)
        for finding in _branches_findings(parts, state.samples):
            warn(finding, state.lint)
        if clipping.is_narrow or (clipping.is_hidden and not few):
            warn(clipping_finding(clipping), state.lint)


class _Stream:
    """A first batch that was taken out of a loader, and the rest of it."""

    def __init__(self, first: Any, rest: Iterator[Any], source: Iterable[Any]) -> None:
        self._batches = chain([first], rest)
        self._source = source

    def __iter__(self) -> Iterator[Any]:
        return self._batches

    def __len__(self) -> int:
        return len(self._source)  # type: ignore[arg-type]


def peek(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and all of them to iterate over once.

    Raises ``CalibrationError`` where there is none.
    """
    iterator = _iterator(batches)
    first = list(limited(iterator, 1))
    if not first:
        raise CalibrationError(
            Finding("QR401", "the loader gives no batches", hint="pass at least one batch")
        )
    return first[0], _Stream(first[0], iterator, batches)


class _InputsTaken(BaseException):
    """Stops a forward as soon as its inputs are known; no ``except Exception`` may stop it."""


def batch_inputs(model: nn.Module, batch: Any, forward: Forward | None) -> Inputs:
    """What the model itself is called with for a batch, without running it.

    Raises ``CalibrationError`` (QR402) where the batch does not fit, ``PlanError`` (QR306) for what
    is no model.
    """
    check_is_model(model)
    if forward is None:
        _check_signature(model, batch, 0)
        return Inputs.from_batch(batch)
    taken: list[Inputs] = []

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken.append(Inputs(args, kwargs))
        raise _InputsTaken

    probe = structural_copy(model)
    probe.register_forward_pre_hook(take, with_kwargs=True)
    try:
        forward(probe, batch)
    except _InputsTaken:
        return taken[0]
    except Exception as error:
        raise unusable_batch(batch, 0, first_line(error)) from error
    raise unusable_batch(batch, 0, "forward did not call the model")


@contextmanager
def inputs_of_batch(model: nn.Module, batch: Any, forward: Forward | None) -> Iterator[Inputs]:
    """What the model is called with for the first batch, to plan with.

    That it cannot take them is said of the batch, and of the ``forward`` to write, where it shows
    only inside. Raises ``CalibrationError`` (QR402).
    """
    inputs = batch_inputs(model, batch, forward)
    try:
        yield inputs
    except PlanError as error:
        if [finding.code for finding in error.findings] != ["QR307"]:
            raise
        why = error.findings[0].message.removeprefix(CANNOT_TAKE)
        helping = None if forward is not None else remedy(model, batch)
        raise unusable_batch(batch, 0, why, helping) from error


def limited(batches: Iterable[Any], limit: int) -> Iterator[Any]:
    """At most ``limit`` batches; what the caller's loader raises comes out as our error."""
    iterator = _iterator(batches)
    for index in range(limit):
        try:
            batch = next(iterator, _NO_MORE)
        except Exception as error:
            raise CalibrationError(
                Finding("QR402", f"the loader failed at batch {index}: {first_line(error)}")
            ) from error
        if batch is _NO_MORE:
            return
        yield batch


def _iterator(batches: Iterable[Any]) -> Iterator[Any]:
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        hint = "pass a list of batches or a DataLoader; one batch alone is [batch]"
        if isinstance(batches, Dataset):
            hint = "wrap it: torch.utils.data.DataLoader(dataset, batch_size=32)"
        kind = type(batches).__name__
        text = f"batches is a {kind}, not an iterable of batches"
        raise CalibrationError(Finding("QR401", text, hint=hint))
    try:
        return iter(batches)
    except Exception as error:
        raise CalibrationError(
            Finding("QR402", f"the loader cannot be iterated: {first_line(error)}")
        ) from error


def known_length(batches: object, limit: int) -> int | None:
    """How many batches there are, up to ``limit``; None where the loader cannot tell."""
    try:
        return min(len(batches), limit)  # type: ignore[arg-type]
    except Exception:  # whatever a loader without a length raises when it is asked
        return None


def _run(prepared: nn.Module, batch: Any, index: int, forward: Forward | None) -> None:
    if index == 0 and is_empty(batch):  # a later one does no harm
        raise unusable_batch(batch, index, EMPTY)
    check_finite(batch, index)
    if forward is None:
        _check_signature(prepared, batch, index)
    try:
        if forward is None:
            Inputs.from_batch(batch).call(prepared)
        else:
            forward(prepared, batch)
    except Exception as error:
        helping = None if forward is not None else remedy(prepared, batch)
        raise unusable_batch(batch, index, first_line(error), helping) from error


def unusable_batch(
    batch: Any, index: int, why: str, helping: Remedy | None = None
) -> CalibrationError:
    """The error for a batch that the model cannot take (QR402), with the remedy if there is one."""
    return CalibrationError(
        Finding(
            "QR402",
            f"the model cannot take batch {index} ({describe_batch(batch)}): {why}",
            hint=_forward_hint(batch) if helping is None else helping.forward,
        )
    )


def _check_signature(model: nn.Module, batch: Any, index: int) -> None:
    inputs = Inputs.from_batch(batch)
    try:
        signature = inspect.signature(model.forward)
    except ValueError:
        return  # not written in Python: the call itself will tell
    try:
        signature.bind(*inputs.args, **dict(inputs.kwargs))
    except TypeError as error:
        helping = remedy(model, batch)
        raise unusable_batch(batch, index, f"forward{signature}: {error}", helping) from error


def _forward_hint(batch: Any) -> str | None:
    if is_empty(batch):
        return "leave it out: a filter, or a dataset without samples, gives such a batch"
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return (
            "does the loader give (inputs, labels)? pass "
            "forward=lambda model, batch: model(batch[0])"
        )
    if not isinstance(batch, (Tensor, tuple, list, Mapping)):
        return "pass forward=lambda model, batch: ... that gives the model its tensors"
    return None


def check_finite(batch: Any, index: int) -> None:
    """Raises ``CalibrationError`` (QR403) for a batch with NaN or infinity."""
    for tensor in tensors_in(batch):
        if not tensor.is_floating_point():
            continue
        if not math.isfinite(tensor.sum().item()) and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise CalibrationError(
                Finding(
                    "QR403",
                    f"batch {index} has {count} NaN or infinite of {tensor.numel()} values",
                    hint="one such batch spoils every range behind it; clean or skip it",
                )
            )


def describe_batch(batch: Any) -> str:
    """A batch in a few words: types, dtypes and shapes."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}"
    parts, kind = parts_of(batch), type(batch).__name__
    if parts is None:
        if hasattr(batch, "dtype") and hasattr(batch, "shape"):  # numpy's arrays
            return f"{kind} {batch.dtype} {list(batch.shape)}"
        return kind
    described = [
        f"{'' if isinstance(key, int) else f'{key}: '}{describe_batch(part)}"
        for key, part in [*parts.items()][:_DESCRIBED]
    ]
    more = len(parts) - _DESCRIBED
    described += [f"{more} more"] * (more > 0)
    return f"{kind} of {', '.join(described)}" if described else f"empty {kind}"


@contextmanager
def _first_calls_kept(prepared: nn.Module, state: PreparedState) -> Iterator[None]:
    """Note what each part is given and answers, whatever ``forward`` makes of a batch."""
    state.samples, state.later_calls, state.whole = {}, {}, None
    handles = [
        prepared.get_submodule(path).register_forward_hook(
            partial(_note, state, path), with_kwargs=True
        )
        for path in state.parts
    ]
    if "" not in state.parts:
        hook = partial(_note_whole, state)
        handles.append(prepared.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note(
    state: PreparedState,
    path: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
) -> None:
    inputs = Inputs(args, dict(kwargs))
    if not path:
        state.samples.setdefault(path, Sample(inputs, output))
        return
    # cloned, for the code around a root may write to both
    sample = Sample(inputs.cloned(), cloned(output))
    if path in state.samples:
        state.later_calls.setdefault(path, []).append(sample)
    else:
        state.samples[path] = sample


def _note_whole(
    state: PreparedState, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    if state.whole is None:
        state.whole = Inputs(args, dict(kwargs)).cloned()


@contextmanager
def _restored_on_error(prepared: nn.Module, state: PreparedState) -> Iterator[None]:
    noted = state.samples, state.later_calls, state.whole
    observers = [module for module in prepared.modules() if isinstance(module, ObserverBase)]
    saved = [copy.deepcopy(vars(observer)) for observer in observers]
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
        raise CalibrationError(
            Finding(
                "QR401",
                f"{counted(done, 'batch')} for calibration, and the recipe wants at least "
                f"{table.min_batches}",
                hint="pass more batches, or lower min_batches in [calibration]",
            )
        )


def _few_batches(state: PreparedState) -> Finding:
    """The warning about few batches (QR201), with what an average makes of them."""
    told, hint = "", "about 100 representative mini-batches are enough"
    if state.first_weight is not None and state.batches > 1:
        told = f", of which the first weighs {state.first_weight:.0%} in moving averages"
    if state.clipping is not None:
        told = f"{told}: {state.clipping}"
        hint = f'{hint}; of these the observer "minmax" clips nothing'
    return Finding(
        "QR201", f"calibrated on {counted(state.batches, 'batch')} only{told}", hint=hint
    )


def _check_ranges(parts: Iterable[fx.GraphModule]) -> None:
    findings = [finding for part in parts for finding in range_findings(part)]
    if findings:
        raise CalibrationError(findings)


def _traced_parts(prepared: nn.Module, state: PreparedState) -> dict[str, fx.GraphModule]:
    """All parts by their paths, save a model that is quantized untraced."""
    parts = {path: prepared.get_submodule(path) for path in state.parts}
    return {path: part for path, part in parts.items() if isinstance(part, fx.GraphModule)}


def _branches_findings(
    parts: Mapping[str, fx.GraphModule], samples: Mapping[str, Sample]
) -> Iterator[Finding]:
    for path, part in parts.items():
        if path in samples:
            yield from branch_findings(part, samples[path])
