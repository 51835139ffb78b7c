"""The model of a command and its example inputs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import typer
from torch import Tensor, nn

from qrecipe.cli.user_code import UserCode
from qrecipe.errors.findings import Finding, QRecipeError
from qrecipe.model.unfit import instead_of_model

_MAX_ELEMENTS = 2**31
_SHAPE = re.compile("[0-9]{1,10}(x[0-9]{1,10})*")


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, and one batch of inputs if the user gives one."""

    model: nn.Module
    example_inputs: Any | None


def load_subject(code: UserCode, name: str, shapes: Sequence[str]) -> Subject:
    """The result of a factory; inputs of the ``shapes``, if any, replace those of the factory.

    Raises QRecipeError (QR601) if the factory fails or does not return a model.
    """
    inputs = random_inputs(shapes) if shapes else None
    result = code.function(name, "--model")()
    model, examples = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        what, hint = instead_of_model(model)
        hint = f"{hint}; or a tuple (model, example_inputs)"
        raise QRecipeError(Finding("QR601", f"{name} returns {what}, not a model", hint=hint))
    return Subject(model, examples if inputs is None else inputs)


def required_inputs(subject: Subject, name: str) -> Any:
    """The subject's example inputs. Raises BadParameter if it has none."""
    if subject.example_inputs is None:
        text = f"{name} returns no example inputs: pass their shapes, as in --input 1x3x224x224"
        raise typer.BadParameter(text, param_hint="--input")
    return subject.example_inputs


def random_inputs(shapes: Sequence[str]) -> tuple[Tensor, ...]:
    """Normally distributed float32 tensors, equal in every run."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(_shape(text), generator=generator) for text in shapes)


def _shape(text: str) -> list[int]:
    shape = [int(size) for size in text.split("x")] if _SHAPE.fullmatch(text) else []
    if not 0 < math.prod(shape) <= _MAX_ELEMENTS or not shape:
        text = f'"{text}" is not a shape: separate sizes by x, as in 1x3x224x224'
        raise typer.BadParameter(text, param_hint="--input")
    return shape
