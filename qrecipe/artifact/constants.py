"""The arguments of a traced ``forward`` that are not tensors: their values are the caller's own."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from types import NoneType
from typing import Any

from torch import nn

from qrecipe.artifact.container import problem
from qrecipe.errors.spelling import did_you_mean
from qrecipe.errors.text import one_line, shown
from qrecipe.model.record import Architecture, TracedPart
from qrecipe.rules.structure import joined

Constants = Mapping[str, bool | int | float | str | None]
"""Arguments by name; those of a root follow its path and a dot."""

_LONGEST_HINT = 300


def with_own_constants(
    architecture: Architecture, model: nn.Module, given: Constants, file: str
) -> Architecture:
    """The architecture with the values that the caller gives, or else with forward's defaults.

    Tracing runs the caller's forward, so no value in a file may choose its branches or the number
    of its loops. Raises ArtifactError (QR507) if the file has others.
    """
    if not isinstance(given, Mapping):
        what = f"needs constants as a mapping by name, not {shown(type(given).__name__)}"
        raise problem("QR507", file, what)
    recorded = {
        joined(part.path, name): value
        for part in architecture.parts
        for name, value in part.constants.items()
    }
    for name in given:
        if name not in recorded:
            what = f"was made without a constant argument {shown(name)} of forward"
            raise problem("QR507", file, what, did_you_mean(name, recorded))
    own = {part.path: _own(part, model, given) for part in architecture.parts}
    values = {joined(path, name): value for path, own in own.items() for name, value in own.items()}
    others = {name: value for name, value in recorded.items() if not _is_same(value, values[name])}
    if others:
        consent = one_line(f"constants={others}")
        if len(consent) > _LONGEST_HINT:
            consent = "constants={...}"
        raise problem(
            "QR507",
            file,
            "was made with arguments that are neither the defaults of forward nor given here",
            f"if the model may be traced with them: load_quantized(..., {consent})",
            [_difference(name, value, values[name]) for name, value in others.items()],
        )
    parts = tuple(
        part.model_copy(update={"constants": own[part.path]}) for part in architecture.parts
    )
    return architecture.model_copy(update={"parts": parts})


def _own(part: TracedPart, model: nn.Module, given: Constants) -> dict[str, Any]:
    parameters = inspect.signature(model.get_submodule(part.path).forward).parameters
    defaults = {name: each.default for name, each in parameters.items()}
    return {
        name: given.get(joined(part.path, name), defaults.get(name, inspect.Parameter.empty))
        for name in part.constants
    }


def _is_same(recorded: Any, own: Any) -> bool:
    # as JSON, in which NaN equals itself, and 1 equals neither 1.0 nor True
    is_plain = isinstance(own, (bool, int, float, str, NoneType))
    return is_plain and json.dumps(own) == json.dumps(recorded)


def _difference(name: str, recorded: Any, own: Any) -> str:
    here = "without a default" if own is inspect.Parameter.empty else f"{shown(own)} here"
    return f"{shown(name)} is {shown(recorded)} in the file, {here}"
