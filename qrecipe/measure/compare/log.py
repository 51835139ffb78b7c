"""The log of a comparison: what each batch has given."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import nn

from qrecipe.execution.batches import Forward
from qrecipe.execution.state import slots_of
from qrecipe.measure.compare.run import Part
from qrecipe.measure.owner import owner_of
from qrecipe.model.digest import tensors_digest
from qrecipe.planning.plan import Plan
from qrecipe.pool.log import PieceLog, open_pieces


def comparison_log(
    resume: str | os.PathLike[str] | None,
    plan: Plan,
    reference: nn.Module,
    converted: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None,
) -> PieceLog[Part]:
    """The log at a path, or a new one; an empty one without a path.

    Raises as `open_pieces`, and ``ExecutionError`` (QR425) for batches that have no digest.
    """
    if resume is None:
        return PieceLog()
    owner = owner_of("a comparison", plan, reference, batches, functions={"forward": forward})
    tensors = chain.from_iterable(slot.tensors().items() for slot in slots_of(converted))
    digests = {**owner.digests, "another converted model": tensors_digest(tensors)}
    return open_pieces(resume, replace(owner, digests=digests), Part)
