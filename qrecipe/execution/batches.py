"""The batches of a caller's loader: iterated, run, checked and described."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from qrecipe.errors.findings import CalibrationError, ExecutionError, PlanError
from qrecipe.errors.text import counted, first_line
from qrecipe.model.call import Inputs, is_empty
from qrecipe.model.copies import structural_copy
from qrecipe.model.digest import value_digest
from qrecipe.model.dry_run import CANNOT_TAKE
from qrecipe.model.nested import parts_of, tensors_in
from qrecipe.model.remedies import Remedy, remedy
from qrecipe.model.unfit import all_finite, check_is_model
from qrecipe.process.memory import failing_as
from qrecipe.process.state import random_numbers_kept

Forward = Callable[[nn.Module, Any], Any]
"""Runs a model on one batch of the caller's loader."""

_DESCRIBED = 4
_NO_MORE = object()
_READ_ANEW = (Sequence, DataLoader)


class _Stream:
    """A first batch that was taken from a loader, and the rest."""

    def __init__(self, first: list[Any], rest: Iterator[Any], source: Iterable[Any]) -> None:
        self._batches = chain(first, rest)
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        return self._batches

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]


def peek(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and all batches to iterate over once.

    Raises ``CalibrationError`` if there is none.
    """
    first, stream = begun(batches)
    if not first:
        raise no_batches()
    return first[0], stream


def begun(batches: Iterable[Any]) -> tuple[list[Any], Iterable[Any]]:
    """The first batch if there is one, and all batches to iterate over once."""
    iterator = _iterator(batches)
    first = list(limited(iterator, 1))
    return first, _Stream(first, iterator, batches)


class _InputsTaken(BaseException):
    """Stops a forward as soon as its inputs are known; ``except Exception`` must not catch it."""


def batch_inputs(model: nn.Module, batch: Any, forward: Forward | None) -> Inputs:
    """The inputs of the model itself for a batch, without running it.

    Raises ``CalibrationError`` (QR402) if the batch does not fit, ``PlanError`` (QR306) if
    ``model`` is not a model.
    """
    check_is_model(model)
    if forward is None:
        check_signature(model, batch, 0)
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
    """The inputs of the model for the first batch, to plan with.

    If planning inside the ``with`` shows that the model cannot take them, the error is about the
    batch and suggests a ``forward``. Raises ``CalibrationError`` (QR402).
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


def limited(batches: Iterable[Any], limit: int | None = None) -> Iterator[Any]:
    """At most ``limit`` batches; exceptions of the caller's loader become ours."""
    iterator = _iterator(batches)
    for index in count() if limit is None else range(limit):
        with failing_as(CalibrationError, "QR402", f"the loader failed at batch {index}"):
            batch = next(iterator, _NO_MORE)
        if batch is _NO_MORE:
            return
        yield batch


def _iterator(batches: Iterable[Any]) -> Iterator[Any]:
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        hint = "pass a list of batches or a DataLoader; a single batch is [batch]"
        if isinstance(batches, Dataset):
            hint = "wrap it: torch.utils.data.DataLoader(dataset, batch_size=32)"
        kind = type(batches).__name__
        text = f"batches is a {kind}, not an iterable of batches"
        raise CalibrationError.of("QR401", text, hint=hint)
    with failing_as(CalibrationError, "QR402", "the loader cannot be iterated"):
        return iter(batches)


def rereadable(batches: Iterable[Any], limit: int | None = None) -> Iterable[Any]:
    """Batches that can be iterated over several times.

    A loader stays as it is; from an iterator, all batches up to ``limit`` are kept. Raises
    ``CalibrationError`` as `qrecipe.calibrate` does.
    """
    if isinstance(batches, _Stream) and isinstance(batches.source, _READ_ANEW):
        return batches.source
    if isinstance(batches, _READ_ANEW):  # each iter() of a loader starts its workers
        return batches
    return list(limited(batches, limit)) if _comes_once(batches) else batches


def _comes_once(batches: object) -> bool:
    if isinstance(batches, Iterator):
        return True
    try:
        return isinstance(batches, Iterable) and iter(batches) is iter(batches)
    except Exception:
        return False  # reported when the batches are read


def known_length(batches: object, limit: int | None = None) -> int | None:
    """The number of batches, up to ``limit``; None if the loader does not know it."""
    try:
        length = len(batches)  # type: ignore[arg-type]
        return length if limit is None else min(length, limit)
    except Exception:  # whatever a loader without a length raises
        return None


def batches_digest(batches: Iterable[Any]) -> str:
    """A digest of what is in all batches, in their order; it reads them once.

    Raises ``ExecutionError`` (QR425) for a batch that cannot be told from another.
    """
    digest = hashlib.sha256()
    for index, batch in enumerate(limited(batches)):
        digest.update(_batch_digest(batch, index))
    return digest.hexdigest()


def steady_digest(batches: Iterable[Any], limit: int | None) -> str:
    """A digest of up to ``limit`` batches, or "" if they cannot be told from others.

    A loader that shuffles gives others each time, so a loader is read twice.
    """
    try:
        with random_numbers_kept():
            first = batches_digest(limited(batches, limit))
            if isinstance(batches, Sequence):
                return first
            return first if batches_digest(limited(batches, limit)) == first else ""
    except ExecutionError:
        return ""


def _batch_digest(batch: Any, index: int) -> bytes:
    what = f"resume cannot tell batch {index} from another"
    hint = "pass batches of tensors and of values that can be pickled"
    with failing_as(ExecutionError, "QR425", what, hint):
        return value_digest(batch).encode()


def run_batch(model: nn.Module, batch: Any, index: int, forward: Forward | None) -> None:
    """Run the model on a batch. Raises ``CalibrationError`` (QR402) if it cannot take it."""
    try:
        if forward is None:
            Inputs.from_batch(batch).call(model)
        else:
            forward(model, batch)
    except Exception as error:
        helping = None if forward is not None else remedy(model, batch)
        # inputs that don't fit the signature are a finding of their own, with another code
        why = error.findings[0].message if isinstance(error, PlanError) else first_line(error)
        raise unusable_batch(batch, index, why, helping) from error


def no_batches() -> CalibrationError:
    """The error for an empty loader."""
    return CalibrationError.of(
        "QR401", "the loader yields no batches", hint="pass at least one batch"
    )


def unusable_batch(
    batch: Any, index: int, why: str, helping: Remedy | None = None
) -> CalibrationError:
    """The error for a batch that the model cannot take (QR402), with the remedy if there is one."""
    return CalibrationError.of(
        "QR402",
        f"the model cannot take batch {index} ({describe_batch(batch)}): {why}",
        hint=_forward_hint(batch) if helping is None else helping.forward,
    )


def check_signature(model: nn.Module, batch: Any, index: int) -> None:
    """Raises ``CalibrationError`` (QR402) if ``forward`` does not have such parameters."""
    inputs = Inputs.from_batch(batch)
    try:
        signature = inspect.signature(model.forward)
    except ValueError:
        return  # not written in Python: the call itself will fail
    try:
        signature.bind(*inputs.args, **dict(inputs.kwargs))
    except TypeError as error:
        helping = remedy(model, batch)
        raise unusable_batch(batch, index, f"forward{signature}: {error}", helping) from error


def _forward_hint(batch: Any) -> str | None:
    if is_empty(batch):
        return "skip it: filters and datasets without samples yield such batches"
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return (
            "does the loader yield (inputs, labels)? pass "
            "forward=lambda model, batch: model(batch[0])"
        )
    if not isinstance(batch, (Tensor, tuple, list, Mapping)):
        return "pass forward=lambda model, batch: ... that passes the tensors to the model"
    return None


def check_finite(batch: Any, index: int) -> None:
    """Raises ``CalibrationError`` (QR403) for a batch with NaN or infinity.

    A tensor that has 0 and -inf alone is a mask, which attention adds to its scores.
    """
    for tensor in tensors_in(batch):
        if tensor.is_floating_point() and not all_finite(tensor) and not _is_mask(tensor):
            found = counted(int((~torch.isfinite(tensor)).sum()), "NaN or infinite value")
            raise CalibrationError.of(
                "QR403",
                f"batch {index} has {found} of {tensor.numel()}",
                hint="one such batch ruins all ranges after it; clean or skip it",
            )


def _is_mask(tensor: Tensor) -> bool:
    return bool(((tensor == 0) | (tensor == -math.inf)).all())


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
