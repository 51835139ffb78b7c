"""What was done to a transformed model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qrecipe.model.kept import TRANSFORMED, kept_with, required
from qrecipe.planning.plan import Chain, Group, Step
from qrecipe.recipe.schema import TransformTable
from qrecipe.terminal.report import Report, Section, Table


@dataclass(frozen=True, slots=True)
class Spread:
    """How far the channels between two sites differ in range: the largest over the median one."""

    site: str
    reader: str
    before: float
    after: float


def spread(site: str, reader: str, largest: Tensor | None, exponents: Tensor) -> Spread:
    """The spread of channels before and after they are divided by powers of two. [channels]"""
    after = None if largest is None else largest / exponents.exp2()
    return Spread(site, reader, _ratio(largest), _ratio(after))


def _ratio(largest: Tensor | None) -> float:
    """How far the ranges of channels differ; 1 if there are none."""
    used = largest[largest > 0] if largest is not None else torch.zeros(0)
    return float(used.max() / used.median()) if used.numel() else 1.0


@dataclass(frozen=True, slots=True, repr=False)
class Transformation(Report):
    """The settings, what was scaled by which exponents, and what became of the channels' ranges.

    ``steps`` are the transforms of plugins, with the modules that they changed.
    ``spreads`` has a row for each pair of sites that follow each other in a chain, and one for each
    group that is scaled.
    """

    table: TransformTable
    chains: tuple[Chain, ...] = ()
    groups: tuple[Group, ...] = ()
    steps: tuple[Step, ...] = ()
    spreads: tuple[Spread, ...] = ()

    def _sections(self) -> Iterator[Section]:
        rows = [
            (each.site, each.reader, f"{each.before:.3g}", f"{each.after:.3g}")
            for each in self.spreads
        ]
        header = ("site", "read by", "spread before", "spread after")
        caption = "spread: the range of the widest channel over that of the median one"
        yield Table("Scaled channels", header, rows, caption)
        if self.steps:
            changes = [(step.name, ", ".join(step.changed)) for step in self.steps]
            yield Table("Transforms", ("transform", "changed"), changes)


def transformation(model: nn.Module) -> Transformation:
    """What `qrecipe.transform` did to a model.

    Raises ``ArtifactError`` (QR501) for any other model.
    """
    hint = "pass the model that qrecipe.transform returned"
    return required(model, TRANSFORMED, Transformation, "was not transformed by qrecipe", hint)


def attach(model: nn.Module, record: Transformation) -> None:
    """Keep the record with the model and its copies."""
    kept_with(model)[TRANSFORMED] = record
