"""What a recipe can be suggested for: the whole model, its roots, or its modules one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from torch import nn

from qrecipe.authoring.suggest.schemes import FEW_CONVOLUTIONS, by_modules, in_graphs, in_programs
from qrecipe.authoring.suggest.subject import Subject
from qrecipe.errors.findings import PlanError
from qrecipe.model.call import Inputs
from qrecipe.model.graph_sites import Inventory
from qrecipe.model.proposals import traceable_parts
from qrecipe.model.work import work_of, work_of_sites
from qrecipe.planning.inventory import inventory_of


def whole(model: nn.Module, inputs: Inputs, num_batches: int | None) -> Subject:
    """The model in one graph. Raises ``PlanError`` if it cannot be."""
    inventory = inventory_of(model, in_graphs(), inputs)
    return _subject(inventory, inputs, num_batches, ())


def parts(model: nn.Module, inputs: Inputs, num_batches: int | None) -> Iterator[Subject]:
    """What is left of a model that cannot be taken as a whole, the better first."""
    try:
        work = work_of(model, inputs)
    except PlanError:  # it does not run at all
        return
    by_convolutions = work.convolution_share >= FEW_CONVOLUTIONS
    for traced in (by_convolutions, not by_convolutions):
        with suppress(PlanError):
            if not traced:
                yield _subject(inventory_of(model, by_modules(), inputs), inputs, num_batches, ())
            elif roots := traceable_parts(model, inputs):
                yield of_roots(model, inputs, roots, num_batches)


def as_program(model: nn.Module, inputs: Inputs, num_batches: int | None) -> Subject | None:
    """The model as a program of torch.export, if it can be one and has enough convolutions."""
    try:
        if work_of(model, inputs).convolution_share < FEW_CONVOLUTIONS:
            return None
        inventory = inventory_of(model, in_programs(), inputs)
    except PlanError:
        return None
    return replace(_subject(inventory, inputs, num_batches, ()), executor="pt2e")


def of_roots(
    model: nn.Module, inputs: Inputs, roots: Sequence[str], num_batches: int | None
) -> Subject:
    """Some parts of the model. Raises ``PlanError`` if they cannot be quantized."""
    inventory = inventory_of(model, in_graphs(roots), inputs)
    return _subject(inventory, inputs, num_batches, tuple(roots))


def _subject(
    inventory: Inventory, inputs: Inputs, num_batches: int | None, roots: tuple[str, ...]
) -> Subject:
    work = work_of(inventory.model, inputs)
    of_sites = work_of_sites(inventory.model, inventory, work.places)
    return Subject(inventory, work, of_sites, roots, num_batches=num_batches)
