"""What the ranks of a group have to agree on before they calibrate together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe._torch_ao import FakeQuantizeBase
from qrecipe.audit.ranges import static_owners
from qrecipe.errors.findings import Finding, PluginError
from qrecipe.execution.batches import begun, no_batches
from qrecipe.model.digest import tensors_digest
from qrecipe.observers.merging import Subject
from qrecipe.process import ranks


def check_same(step: str, fingerprint: str, model: nn.Module) -> None:
    """Raises ``CalibrationError`` (QR409) on all ranks unless recipe and model are the same."""

    def facts() -> dict[str, str]:
        modules = [f"{path} {type(module).__name__}" for path, module in model.named_modules()]
        return {
            "another torch": torch.__version__,
            "another recipe": fingerprint,
            "another model": "\n".join(modules),
            "other tensors": tensors_digest(_tensors(model)),
        }

    ranks.check_same(step, facts)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All tensors, but not those that torch's fake-quants leave uninitialised until they round."""
    for path, module in model.named_modules():
        if not isinstance(module, FakeQuantizeBase):
            for name, tensor in chain(
                module.named_parameters(recurse=False), module.named_buffers(recurse=False)
            ):
                yield f"{path}.{name}", tensor


def first_of_all(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch of the first rank that has one, and the batches of this one.

    Raises ``CalibrationError`` (QR401) if no rank has one.
    """
    own, stream = begun(batches)
    has_one = ranks.gathered("a look for batches", lambda: bool(own))
    if not any(has_one):
        raise no_batches()
    lead = has_one.index(True)
    sent = ranks.gathered("the first batch", lambda: own if ranks.rank() == lead else [])
    return sent[lead][0], stream


def subjects_in(parts: Mapping[str, fx.GraphModule]) -> list[Subject]:
    """The observers of static ranges, once each."""
    found: dict[nn.Module, Subject] = {}
    for part in parts.values():
        for name, owner, observer in static_owners(part):
            found.setdefault(observer, Subject(name, owner, observer, owner))
    return list(found.values())


def check_mergeable(subjects: Sequence[Subject], has_merged: bool) -> None:
    """Raises ``PluginError`` (QR157) for observers that cannot be merged.

    One that merges itself cannot go on from what all ranks have seen before: each would count it.
    """
    silent = {type(each.observer).__name__ for each in subjects if each.merging is None}
    merging = {type(each.observer).__name__ for each in subjects if each.merging == "merge"}
    findings = [
        Finding(
            "QR157",
            f"the observer {name} does not say how it merges with those of other ranks",
            hint="give it a method merge(self, others), or calibrate in one process",
        )
        for name in sorted(silent)
    ]
    findings += [
        Finding(
            "QR157",
            f"the observer {name} has merged before and cannot go on from there",
            hint="calibrate once with all batches, or prepare the model anew",
        )
        for name in sorted(merging)
        if has_merged
    ]
    if findings:
        raise PluginError(findings)
