"""A comparison in pieces, one batch each: their log, and workers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from qrecipe.artifact.loading import load_quantized
from qrecipe.artifact.saving import save_quantized
from qrecipe.execution.batches import Forward, limited
from qrecipe.execution.engine import engine_of
from qrecipe.execution.provenance import architecture, provenance
from qrecipe.execution.state import slots_of
from qrecipe.measure.compare.run import Part, Run
from qrecipe.measure.owner import owner_of
from qrecipe.model.digest import tensors_digest
from qrecipe.pool.crew import crew_for
from qrecipe.pool.log import PieceLog, open_pieces
from qrecipe.pool.parcel import Compute
from qrecipe.pool.workers import Pool
from qrecipe.recipe.recipe import Recipe, parse_recipe
from qrecipe.rules.structure import joined


@dataclass(frozen=True, slots=True)
class CompareWork:
    """Both models for workers: the converted one as a stored model, for the float one."""

    model: nn.Module
    recipe: Recipe
    forward: Forward | None
    stored: bytes
    constants: dict[str, Any]

    def begun(self, batches: Sequence[Any]) -> Compute:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "converted.safetensors")
            path.write_bytes(self.stored)
            converted = load_quantized(path, self.model, constants=self.constants)
        run = Run(self.model, converted, batches[0], self.forward)

        def compute(index: int) -> Part:
            with engine_of(run.plan):
                return run.part(batches[index], index)

        return compute


def parts_of(
    run: Run, batches: Iterable[Any], pool: Executor | Pool | None, log: PieceLog[Part]
) -> Generator[tuple[int, Part], None, None]:
    """What each batch adds, by its index; from workers in any order."""
    if pool is not None:
        yield from _of_workers(run, limited(batches), pool, log)
        return
    with engine_of(run.plan):
        for index, batch in enumerate(limited(batches)):
            yield index, log.value(str(index), partial(run.part, batch, index))


def _of_workers(
    run: Run, batches: Iterable[Any], pool: Executor | Pool, log: PieceLog[Part]
) -> Iterator[tuple[int, Part]]:
    recipe = parse_recipe(provenance(run.converted).recipe)
    stored, constants = _stored(run.converted), _constants(run.converted)
    work = CompareWork(run.reference, recipe, run.forward, stored, constants)
    with crew_for(work, batches, pool) as crew:
        pieces = range(crew.batches)
        yield from ((index, log.kept[str(index)]) for index in pieces if str(index) in log.kept)
        left = [index for index in pieces if str(index) not in log.kept]
        for index, part in crew.results(left):
            log.note({str(index): part})
            yield index, part


def _stored(converted: nn.Module) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "converted.safetensors")
        save_quantized(converted, path)
        return path.read_bytes()


def _constants(converted: nn.Module) -> dict[str, Any]:
    """What the model was traced with besides tensors, which `load_quantized` wants to be told."""
    return {
        joined(part.path, name): value
        for part in architecture(converted).parts
        for name, value in part.constants.items()
    }


def comparison_log(
    resume: str | os.PathLike[str] | None, run: Run, batches: Iterable[Any]
) -> PieceLog[Part]:
    """The log at a path, or a new one; an empty one without a path.

    Raises as `open_pieces`, and ``ExecutionError`` (QR425) for batches that have no digest.
    """
    if resume is None:
        return PieceLog()
    functions = {"forward": run.forward}
    owner = owner_of("a comparison", run.plan, run.reference, batches, functions=functions)
    tensors = chain.from_iterable(slot.tensors().items() for slot in slots_of(run.converted))
    digests = {**owner.digests, "another converted model": tensors_digest(tensors)}
    return open_pieces(resume, replace(owner, digests=digests), Part)
