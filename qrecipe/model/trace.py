"""Traces a model the way FX graph mode quantization does."""

from __future__ import annotations

import ast
import inspect
import keyword
import operator
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.fx._symbolic_trace import _assert_is_none as assert_is_none
from torch.fx.immutable_collections import immutable_dict, immutable_list

from qrecipe._torch_fx import QuantizationTracer, swap_float_functional
from qrecipe.errors.findings import Finding, TraceError, error_from
from qrecipe.errors.spelling import did_you_mean
from qrecipe.errors.text import first_line, quoted_whole
from qrecipe.model.copies import runnable_copy
from qrecipe.model.graph_names import rename_taken
from qrecipe.model.nested import Packing, leaves, parts_of
from qrecipe.model.opened.whole import Whole
from qrecipe.model.out_of_place import drop_dead_code
from qrecipe.model.switches import BATCH_NORMS, DROPOUTS, arguments, flag, told
from qrecipe.model.unfit import hidden_modules
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.process.state import random_numbers_kept, traced_alone
from qrecipe.recipe.schema import FxTable
from qrecipe.rules.structure import enclosing, joined

Scopes = Mapping[str, tuple[str, type]]
"""The path and class of the innermost module whose forward made a node's call, by node name."""


class UntraceableError(TraceError):
    """Tracing the part at ``path`` failed in the forward of the module ``at``.

    `proposals.with_advice` adds what to do about it.
    """

    def __init__(self, finding: Finding, path: str, at: str) -> None:
        super().__init__(finding)
        self.path, self.at = path, at


def trace(
    model: nn.Module, path: str, fixed: Mapping[str, Any], table: FxTable
) -> tuple[fx.GraphModule, Scopes]:
    """The graph of a copy of the submodule at ``path``, in eval mode, and its scopes.

    The copy shares the parameters, and dead code is dropped. Names in ``table`` are relative to
    the whole model, ``scopes`` to the submodule. ``fixed`` are the arguments of its forward that
    are not tensors.

    Raises ``TraceError`` with the submodule and the line that cannot be traced.
    """
    tracer = _tracer(model, path, table)
    root = _traceable_copy(model, path)
    try:
        graph = tracer.trace(root, dict(fixed))
        _name_placeholders(graph, root)
        _check_names(graph, path)
        rename_taken(graph, root)
        graph_module = fx.GraphModule(root, graph)
    except TraceError:
        raise
    except Exception as error:
        at = joined(path, tracer.path)
        raise _untraceable(error, path, at, model) from error
    _check_placeholders(graph_module, path)
    drop_dead_code(graph_module)
    return graph_module, tracer.node_name_to_scope


def hook_findings(model: nn.Module, path: str, table: FxTable) -> Iterator[Finding]:
    """Hooks on modules that are traced through (QR230), which only run during tracing."""
    tracer = _tracer(model, path, table)
    leaves: set[str] = set()
    for name, module in model.get_submodule(path).named_modules():
        if not leaves.isdisjoint(enclosing(name)[1:]):
            continue
        if name and tracer.is_leaf_module(module, name):
            leaves.add(name)
        elif module._forward_hooks or module._forward_pre_hooks:
            where = joined(path, name) or "the model itself"
            what = "only what they compute with tensors is kept" if name else "nothing is kept"
            yield Finding(
                "QR230",
                f"{where} has hooks, which the quantized model will not run: {what}",
                hint="register them on the quantized model instead",
            )


@dataclass(frozen=True, slots=True)
class InTraining:
    """How a forward differs in training mode from eval mode.

    ``other`` is the path of a module that takes a different branch, or None; ``switched`` maps the
    names of the dropouts and BatchNorms that are functions, and whose flag is set in training
    mode, to the momentum that they get in it.
    """

    other: str | None
    switched: Mapping[str, Any]


def in_training(
    model: nn.Module, path: str, fixed: Mapping[str, Any], table: FxTable
) -> InTraining:
    """Compare the traces of a submodule in both modes; the arguments are those of `trace`."""
    calls: list[list[tuple[Any, ...]]] = []
    flagged: list[dict[str, Any]] = []
    for training in (False, True):
        root = _traceable_copy(model, path).train(training)
        tracer = _tracer(model, path, table)
        try:
            graph = tracer.trace(root, dict(fixed))
        except Exception as error:
            raise_lack_of_memory(error)
            return InTraining(joined(path, tracer.path), {})
        scopes = tracer.node_name_to_scope
        calls.append(
            [
                (joined(path, scopes[node.name][0]), node.op, *told(node))
                for node in graph.nodes
                if node.name in scopes and node.op.startswith("call")
            ]
            + [(path, "output", *told(graph.output_node()))]
        )
        flagged.append(
            {
                node.name: arguments(node).get("momentum")
                for node in graph.nodes
                if (node.target in DROPOUTS or node.target in BATCH_NORMS) and flag(node) is True
            }
        )
    always, switched = flagged
    switched = {name: value for name, value in switched.items() if name not in always}
    for one, other in zip_longest(*calls, fillvalue=(path,)):
        if one[1:] != other[1:]:
            return InTraining(str(max(one[0], other[0], key=len)), switched)
    return InTraining(None, switched)


def _traceable_copy(model: nn.Module, path: str) -> nn.Module:
    """A copy of a submodule without what only hinders tracing it."""
    root = runnable_copy(model.get_submodule(path))
    for module in root.modules():
        # leftovers of an earlier prepare would look like our decisions
        module.__dict__.pop("qconfig", None)
        if isinstance(module, nn.modules.batchnorm._NormBase) and _is_subclass(module):
            # their inherited forward branches on the rank
            vars(module)["_check_input_dim"] = _accept
    swap_float_functional(root)
    return root


def _is_subclass(module: nn.Module) -> bool:
    return not type(module).__module__.startswith("torch.nn.")


def _accept(input: Any) -> None:
    """Checks nothing."""


def _name_placeholders(graph: fx.Graph, root: nn.Module) -> None:
    """Name the inputs after forward's parameters; tracing numbers them if there are constants."""
    parameters = inspect.signature(root.forward).parameters.values()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, parameter in zip(placeholders, parameters, strict=True):
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            node.target = parameter.name
    for node in list(graph.nodes):
        if node.target is assert_is_none:
            _keep_assertion(graph, node)


def _keep_assertion(graph: fx.Graph, node: fx.Node) -> None:
    """Replace an assertion with one that does not count as dead code."""
    value, message = node.args
    with graph.inserting_before(node):
        is_none = graph.call_function(operator.is_, (value, None))
        graph.call_function(torch._assert, (is_none, message))
    graph.erase_node(node)


def _check_names(graph: fx.Graph, path: str) -> None:
    """Reject names that cannot be written in Python code, which graphs become."""
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        parts = str(node.target).split(".")
        odd = next((part for part in parts if not _is_spelt_by_code(part)), None)
        if odd is None:
            continue
        name = joined(path, str(node.target))
        what = (
            f"{name} contains a Python keyword"
            if keyword.iskeyword(odd)
            else f"{quoted_whole(name)} cannot be written in the Python code of a graph"
        )
        raise TraceError(Finding("QR305", what, hint="rename it"))


def _is_spelt_by_code(part: str) -> bool:
    """Whether a name can be written as an identifier, or in the quotes that FX uses."""
    try:
        read = ast.parse(part if part.isidentifier() else f'"{part}"', mode="eval").body
    except (SyntaxError, ValueError):
        return False
    return part == (read.id if isinstance(read, ast.Name) else getattr(read, "value", None))


def _check_placeholders(graph_module: fx.GraphModule, path: str) -> None:
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and str(node.target).startswith("*"):
            whose = f'the forward of "{path}"' if path else "the model's forward"
            raise UntraceableError(
                Finding(
                    "QR305",
                    f"{whose} takes {node.target}, whose length tracing cannot know",
                    hint="give forward a named argument for each input",
                ),
                path,
                path,
            )


class _AutocastError(Exception):
    """A call under ``torch.autocast``, which a graph would not keep."""


class _Tracer(QuantizationTracer):
    """Remembers the innermost module whose forward it was in when tracing failed."""

    def __init__(self, module_names: list[str], module_classes: list[Callable[..., Any]]) -> None:
        super().__init__(module_names, module_classes)
        self.record_stack_traces = False
        self.path = ""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        # what forward draws or writes during tracing must not affect the caller
        with traced_alone(), random_numbers_kept():
            return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Whole) or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if torch.is_autocast_enabled("cpu"):
            raise _AutocastError
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """Like torch, but containers of custom classes keep their class."""
        if isinstance(a, fx.Proxy) or _is_made_again_by_torch(a):
            return super().create_arg(a)
        packing = Packing(a, lambda leaf: isinstance(leaf, (fx.Proxy, torch.Tensor)))
        given = tuple(map(self.create_arg, packing.open_leaves))
        return self.create_node("call_function", packing, given, {})

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        outer, self.path = self.path, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        # not in a finally clause: after an error, the path is where it happened
        self.path = outer
        return result


def _is_made_again_by_torch(value: Any) -> bool:
    """Whether FX can rebuild an argument: a leaf or a plain container."""
    kind, parts = type(value), parts_of(value)
    if parts is None or kind in (dict, immutable_dict, list, immutable_list):
        return True
    if isinstance(value, (tuple, list)):
        # a subclass of a named tuple may have its own constructor
        is_named = hasattr(kind, "_fields") and kind.__bases__ == (tuple,)
        has_proxies = any(isinstance(leaf, fx.Proxy) for leaf in leaves(value))
        return kind is tuple or is_named or not has_proxies
    if isinstance(value, Mapping) or not is_dataclass(value) or hasattr(kind, "__post_init__"):
        return False
    is_plain = list(inspect.signature(kind).parameters) == [each.name for each in fields(value)]
    return is_plain and all(parts_of(part) is None for part in parts.values())


def _tracer(model: nn.Module, path: str, table: FxTable) -> _Tracer:
    """A tracer of the submodule at ``path``. Raises ``PlanError`` (QR301) for unknown names."""
    names, classes = table.non_traceable_module_name, table.non_traceable_module_class
    modules = dict(model.named_modules())
    by_name = {f"{type(m).__module__}.{type(m).__qualname__}": type(m) for m in modules.values()}
    _check_known("fx.non_traceable_module_name", names, modules, "module of the model")
    _check_known(
        "fx.non_traceable_module_class", classes, by_name, "class of any module of the model"
    )
    within = f"{path}." if path else ""
    return _Tracer([name.removeprefix(within) for name in names], [by_name[k] for k in classes])


def _check_known(key: str, names: Sequence[str], known: Collection[str], what: str) -> None:
    missing = [
        Finding("QR301", f'{key} "{name}" is not a {what}', hint=did_you_mean(name, known), key=key)
        for name in names
        if name not in known
    ]
    if missing:
        raise error_from(missing)


def _untraceable(error: Exception, path: str, at: str, model: nn.Module) -> UntraceableError:
    kind = type(model.get_submodule(at)).__name__
    where = f'submodule "{at}" ({kind})' if at else f"the model's own forward ({kind})"
    line = _user_line(error)
    if isinstance(error, _AutocastError):
        what = f"{where} is called under torch.autocast{f' at {line}' if line else ''}"
        finding = Finding("QR305", f"{what}, which a graph does not keep", hint=WITHOUT_AUTOCAST)
        return UntraceableError(finding, path, at)
    why, hint = first_line(error), None
    hidden = hidden_modules(model) if why == _NOT_INSTALLED else None
    if hidden is not None:
        why, hint = hidden
    message = f"{where} cannot be traced{f' at {line}' if line else ''}: {why}"
    return UntraceableError(Finding("QR305", message, hint=hint), path, at)


WITHOUT_AUTOCAST = (
    "remove torch.autocast from the model's code, and call the float model under it instead"
)
_NOT_INSTALLED = "module is not installed as a submodule"


_NOT_THE_CALLERS = (Path(torch.__file__).parent, Path(__file__).parents[1])


def _user_line(error: Exception) -> str | None:
    """The innermost line of the user's code in the traceback."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<")  # code generated by FX
        and not any(map(Path(frame.filename).is_relative_to, _NOT_THE_CALLERS))
    ]
    if not frames:
        return None
    frame = frames[-1]
    path = Path(frame.filename)
    here = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{here}:{frame.lineno} `{frame.line}`"
