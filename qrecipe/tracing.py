"""A model as a graph of our own, traced as FX's quantization does."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from qrecipe._torch_fx import QuantizationTracer, swap_float_functional
from qrecipe.copying import runnable_copy
from qrecipe.errors import Finding, TraceError, did_you_mean, error_from, first_line
from qrecipe.schema import FxTable

Scopes = Mapping[str, tuple[str, type]]
"""The path and class of the innermost module whose forward made a node's call, by node name."""


def trace(model: nn.Module, table: FxTable) -> tuple[fx.GraphModule, Scopes]:
    """The graph of a copy of ``model`` in eval mode, sharing its parameters, and its scopes.

    Raises ``TraceError`` that names the submodule, the line and the key to add.
    """
    root = runnable_copy(model)
    for module in root.modules():
        # what an earlier prepare left behind would be taken for a decision of ours
        module.__dict__.pop("qconfig", None)
    swap_float_functional(root)
    tracer = _Tracer(
        _known_modules(root, table.non_traceable_module_name),
        _known_classes(root, table.non_traceable_module_class),
    )
    try:
        graph_module = fx.GraphModule(root, tracer.trace(root))
    except Exception as error:
        raise TraceError(_trace_finding(error, tracer.path, root)) from error
    _check_placeholders(graph_module)
    return graph_module, tracer.node_name_to_scope


def _check_placeholders(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and str(node.target).startswith("*"):
            raise TraceError(
                Finding(
                    "QR305",
                    f"the model's forward takes {node.target}, whose length tracing cannot know",
                    hint="give forward one named argument for each input",
                )
            )


class _Tracer(QuantizationTracer):
    """Remembers the innermost module whose forward it was in when tracing failed."""

    def __init__(self, module_names: list[str], module_classes: list[Callable[..., Any]]) -> None:
        super().__init__(module_names, module_classes)
        self.record_stack_traces = False
        self.path = ""

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        outer, self.path = self.path, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        # not in a finally clause: after an error the path stays where it happened
        self.path = outer
        return result


def _known_modules(root: nn.Module, names: list[str]) -> list[str]:
    known = dict(root.named_modules())
    missing = [
        Finding(
            "QR301",
            f'fx.non_traceable_module_name "{name}" names no module of the model',
            hint=did_you_mean(name, known),
        )
        for name in names
        if name not in known
    ]
    if missing:
        raise error_from(missing)
    return names


def _known_classes(root: nn.Module, names: list[str]) -> list[Callable[..., Any]]:
    by_name = {f"{type(m).__module__}.{type(m).__qualname__}": type(m) for m in root.modules()}
    missing = [
        Finding(
            "QR301",
            f'fx.non_traceable_module_class "{name}" names no class of the model\'s modules',
            hint=did_you_mean(name, by_name),
        )
        for name in names
        if name not in by_name
    ]
    if missing:
        raise error_from(missing)
    return [by_name[name] for name in names]


def _trace_finding(error: Exception, path: str, root: nn.Module) -> Finding:
    kind = type(root.get_submodule(path)).__name__
    where = f'submodule "{path}" ({kind})' if path else f"the model's own forward ({kind})"
    line = _user_line(error)
    message = f"{where} cannot be traced{f' at {line}' if line else ''}: {first_line(error)}"
    if not path:
        return Finding(
            "QR305",
            message,
            hint="rewrite this line without control flow on tensors, or quantize the parts that "
            'trace: [fx] roots = ["..."]',
        )
    return Finding(
        "QR305",
        message,
        hint=f'leave its inside float: [fx] non_traceable_module_name = ["{path}"]',
    )


_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)


def _user_line(error: Exception) -> str | None:
    """The innermost line of the caller's own code in the traceback, as ``file:line: source``."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_TORCH, _HERE, "<"))
    ]
    if not frames:
        return None
    frame = frames[-1]
    return f"{frame.filename}:{frame.lineno} `{frame.line}`"
