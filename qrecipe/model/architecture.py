"""A float model without its weights as plain data, from which a stored model is rebuilt.

The traced graphs are recorded before they are rewritten, with what each node computes, so that
they can be rebuilt without running the model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn

from qrecipe.model.record import Architecture, TracedNode, TracedPart
from qrecipe.model.record import Value as RecordedValue
from qrecipe.model.scaled_input import class_without_scale
from qrecipe.model.trace import Traced
from qrecipe.model.trace_proof import Value
from qrecipe.model.tracer import without_line
from qrecipe.rules.structure import enclosing

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_UNIMPORTANT = frozenset({"training", "momentum", "p", "dropout", "inplace"})
"""Attributes that do not matter in eval mode, or are in the graph."""

_VALUES: dict[RecordedValue, Value] = {
    "float tensor": Value(True, True),
    "tensor": Value(False, True),
    "floats": Value(True, False),
    "other": Value(False, False),
}
_NAMES = {value: name for name, value in _VALUES.items()}
_KEPT = ("rank", "is_input", "is_finite", "count")
"""What else of a value is recorded."""


def traced_part(traced: Traced) -> TracedPart:
    """A traced graph with recorded values, as data."""
    subject = traced.subject
    nodes = tuple(
        TracedNode(
            name=node.name,
            call=_call(node),
            value=_NAMES[node.meta["value"]],
            **{name: getattr(node.meta["value"], name) for name in _KEPT},
        )
        for node in traced.graph_module.graph.nodes
    )
    return TracedPart(
        path=subject.path,
        constants=dict(subject.fixed),
        nodes=nodes,
        shapes=dict(subject.shapes),
    )


class ArchitectureError(Exception):
    """The model is not the one that was quantized; ``differences`` says where."""

    def __init__(self, differences: list[str]) -> None:
        super().__init__(differences)
        self.differences = differences


def note_values(part: TracedPart, graph_module: fx.GraphModule) -> None:
    """Give the nodes the recorded values. Raises `ArchitectureError` for another graph."""
    found = {node.name: _call(node) for node in graph_module.graph.nodes}
    recorded = {node.name: node.call for node in part.nodes}
    check_same(f"forward of {part.path}" if part.path else "forward", recorded, found)
    values = {
        node.name: replace(_VALUES[node.value], **{name: getattr(node, name) for name in _KEPT})
        for node in part.nodes
    }
    for node in graph_module.graph.nodes:
        node.meta["value"] = values[node.name]


def module_settings(model: nn.Module) -> dict[str, str]:
    """Class and settings of each of torch's own modules."""
    return {
        path: _settings(module)
        for path, module in model.named_modules()
        if class_without_scale(module).__module__.startswith("torch.nn.")
    }


def recorded_modules(
    model: nn.Module, planned: nn.Module, opened: Collection[str]
) -> dict[str, str]:
    """The `module_settings` of a model, with the layers that its first call made in ``planned``.

    That is a copy in which the layers at the paths ``opened`` are opened.
    """
    made = {
        path: settings
        for path, settings in module_settings(planned).items()
        if not any(around in opened for around in enclosing(path))
    }
    return {**made, **module_settings(model)}


def graph_digests(converted: nn.Module, architecture: Architecture) -> dict[str, str]:
    """The SHA-256 of the code of each converted part; equal graphs have equal digests."""
    return {
        part.path: hashlib.sha256(
            without_line(str(converted.get_submodule(part.path).code)).encode()
        ).hexdigest()
        for part in architecture.parts
    }


def check_same(what: str, recorded: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raises `ArchitectureError` if two maps by name differ; ``recorded`` is the file's."""
    differences = []
    for name in [*recorded, *(name for name in found if name not in recorded)]:
        stored, own = recorded.get(name, "nothing"), found.get(name, "nothing")
        if stored != own:
            place = f"{what}, {name or 'the model itself'}"
            differences.append(f"{place}: {stored} in the file, {own} in the model")
    if differences:
        raise ArchitectureError(differences)


def _settings(module: nn.Module) -> str:
    values = {
        name: value
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name not in _UNIMPORTANT and _is_plain(value)
    }
    kind = class_without_scale(module)
    listed = ", ".join(f"{name}={value!r}" for name, value in values.items())
    return f"{kind.__qualname__}({listed})"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _call(node: fx.Node) -> str:
    target: Any = node.target
    if not isinstance(target, str):
        name = getattr(target, "__qualname__", None) or str(target)
        target = f"{getattr(target, '__module__', None) or 'torch'}.{name}"
    arguments = [*map(str, node.args), *(f"{key}={value}" for key, value in node.kwargs.items())]
    return without_line(_ADDRESS.sub("", f"{node.op} {target}({', '.join(arguments)})"))
