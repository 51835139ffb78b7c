"""Changes after which a model accepts a batch that it rejects; tried before they are proposed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qrecipe.model.call import Inputs, is_empty
from qrecipe.model.copies import runnable_copy
from qrecipe.model.dry_run import try_out
from qrecipe.process.state import random_numbers_kept

_FEW = 2
_MOST_TRIES = 60
_MOST_KEYS = 6
_IMAGE_CHANNELS = (1, 3, 4)


@dataclass(frozen=True, slots=True)
class _Step:
    """A change to a tensor: the fault without it, how it is written, and what it does."""

    fault: str
    text: str
    change: Callable[[Any], Any]
    applies: Callable[[Any], bool]


def _of_tensors(
    fault: str, text: str, change: Callable[[Any], Any], applies: Callable[[Any], bool]
) -> _Step:
    return _Step(fault, text, change, lambda x: isinstance(x, Tensor) and applies(x))


def _is_image(x: Tensor, dim: int) -> bool:
    return x.dim() == dim and x.shape[-1] in _IMAGE_CHANNELS


_STEPS = (
    _Step(
        "not a tensor", "torch.as_tensor({})", torch.as_tensor, lambda x: not isinstance(x, Tensor)
    ),
    _of_tensors("not on the CPU", "{}.cpu()", lambda x: x.cpu(), lambda x: x.device.type != "cpu"),
    _of_tensors(
        "uint8, and not scaled as in training",
        "({}.float() / 255)",
        lambda x: x.float() / 255,
        lambda x: x.dtype == torch.uint8,
    ),
    _of_tensors(
        "not float32",
        "{}.float()",
        lambda x: x.float(),
        lambda x: x.dtype not in (torch.float32, torch.uint8),
    ),
    _of_tensors("not integers", "{}.long()", lambda x: x.long(), lambda x: x.is_floating_point()),
    _of_tensors(
        "channels last",
        "{}.permute(0, 3, 1, 2)",
        lambda x: x.permute(0, 3, 1, 2),
        lambda x: _is_image(x, 4),
    ),
    _of_tensors(
        "channels last",
        "{}.permute(2, 0, 1)",
        lambda x: x.permute(2, 0, 1),
        lambda x: _is_image(x, 3),
    ),
    _of_tensors("no batch dimension", "{}.unsqueeze(0)", lambda x: x.unsqueeze(0), lambda x: True),
)


@dataclass(frozen=True, slots=True)
class _Selection:
    """A part of a batch: the fault of the rest, and how the part is written and passed.

    ``stars`` is "*" for several positional inputs and "**" for keyword inputs.
    """

    fault: str
    text: str
    stars: Literal["", "*", "**"]
    value: Any

    def changed(self, steps: Sequence[_Step]) -> Any:
        """The value with the steps applied to each tensor; None if one of them changes nothing."""
        parts = {"": [self.value], "*": self.value, "**": None}[self.stars]
        changed = list(self.value.values() if parts is None else parts)
        for step in steps:
            if not changed or not all(map(step.applies, changed)):
                return None
            changed = [step.change(x) for x in changed]
        if self.stars == "**":
            return dict(zip(self.value, changed, strict=True))
        return changed if self.stars else changed[0]

    def written(self, steps: Sequence[_Step]) -> str:
        """The Python expression to pass."""
        if not self.stars or not steps:
            return _applied(steps, self.text)
        if self.stars == "*":
            return f"[{_applied(steps, 'x')} for x in {self.text}]"
        return f"{{k: {_applied(steps, 'x')} for k, x in {self.text}.items()}}"


def _applied(steps: Sequence[_Step], text: str) -> str:
    for step in steps:
        text = step.text.format(text)
    return text


@dataclass(frozen=True, slots=True)
class Remedy:
    """What is wrong with a batch, and the Python expression of ``batch`` that fixes it."""

    fault: str
    mended: str
    stars: str

    @property
    def forward(self) -> str:
        """The hint for a loader of such batches."""
        return f"{self.fault}: pass forward=lambda model, batch: model({self.stars}{self.mended})"

    @property
    def value(self) -> str:
        """The hint for a single batch."""
        return f"{self.fault}: if batch is what you passed, pass {self.mended}"


def remedy(model: nn.Module, batch: Any) -> Remedy | None:
    """The smallest change with which a copy of the model runs, or None."""
    whole, *parts = _selections(model, batch)
    if is_empty(batch) or _runs(model, whole, ()):
        return None  # in the second case, it is not the batch that fails
    tries = (
        (count + (order > 0), order, selection, steps)
        for order, selection in enumerate((whole, *parts))
        for count in range(len(_STEPS))
        for steps in combinations(_STEPS, count)
        if order or steps
    )
    smallest_first = sorted(tries, key=lambda each: each[:2])
    possible = (each for each in smallest_first if _is_change(each[2], each[3]))
    for _, _, selection, steps in islice(possible, _MOST_TRIES):
        if _runs(model, selection, steps):
            faults = [selection.fault] * bool(selection.fault) + [step.fault for step in steps]
            return Remedy(", ".join(faults), selection.written(steps), selection.stars)
    return None


def _is_change(selection: _Selection, steps: Sequence[_Step]) -> bool:
    try:
        return selection.changed(steps) is not None
    except Exception:  # what is not a tensor may be anything
        return False


def _runs(model: nn.Module, selection: _Selection, steps: Sequence[_Step]) -> bool:
    value = selection.changed(steps)
    inputs = Inputs.from_batch(value if selection.stars else (value,))
    try:
        with random_numbers_kept():
            try_out(runnable_copy(model), inputs.first_samples(_FEW).cloned(), model)
    except Exception:
        return False
    return True


def _selections(model: nn.Module, batch: Any) -> Iterator[_Selection]:
    """The whole batch, and the parts of it that the model may expect."""
    if isinstance(batch, Mapping):
        yield _Selection("", "batch", "**", dict(batch))
        known = _parameters(model)
        taken = {key: value for key, value in batch.items() if key in known}
        if taken and len(taken) < len(batch):
            chosen = ", ".join(f"{key!r}: batch[{key!r}]" for key in taken)
            yield _Selection("keys that forward lacks", f"{{{chosen}}}", "**", taken)
        for key, value in islice(batch.items(), _MOST_KEYS):
            text = f"batch[{key!r}]"
            yield _Selection("keys that do not fit forward", text, "", value)
    elif isinstance(batch, (tuple, list)):
        yield _Selection("", "batch", "*", batch)
        if len(batch) > 2:
            yield _Selection("labels next to the inputs", "batch[:-1]", "*", batch[:-1])
        if batch and isinstance(batch[0], Mapping):
            yield _Selection("a dict in a list", "batch[0]", "**", dict(batch[0]))
        if batch:
            yield _Selection("labels next to the input", "batch[0]", "", batch[0])
        yield _Selection("", "batch", "", batch)
    else:
        yield _Selection("", "batch", "", batch)


def _parameters(model: nn.Module) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(model.forward).parameters)
    except ValueError:
        return frozenset()
