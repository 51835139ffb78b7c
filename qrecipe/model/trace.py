"""Traces a model the way FX graph mode quantization does."""

from __future__ import annotations

import ast
import keyword
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import takewhile, zip_longest
from typing import Any

import torch
from torch import fx, nn
from torch.fx._symbolic_trace import _assert_is_none as assert_is_none

from qrecipe._torch_fx import swap_float_functional
from qrecipe.errors.findings import Finding, TraceError, error_from
from qrecipe.errors.spelling import did_you_mean
from qrecipe.errors.text import quoted_whole
from qrecipe.model.call import Inputs, constants
from qrecipe.model.changes import spell_out_changes
from qrecipe.model.class_names import class_names
from qrecipe.model.copies import runnable_copy
from qrecipe.model.graph_names import rename_taken
from qrecipe.model.opened.whole import class_of_the_caller
from qrecipe.model.record import Shapes, TracedPart
from qrecipe.model.shapes import shapes_of
from qrecipe.model.switches import BATCH_NORMS, arguments, flag, told
from qrecipe.model.tracer import Tracer
from qrecipe.model.untraceable import BatchSizeError, check_named, untraceable
from qrecipe.process.memory import raise_lack_of_memory
from qrecipe.recipe.schema import FxTable
from qrecipe.rules.structure import enclosing, joined

Scopes = Mapping[str, tuple[str, type]]
"""The path and class of the innermost module whose forward made a node's call, by node name."""


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What is traced: the submodule of a model at ``path``, as it is called with some inputs.

    Names in ``table`` are relative to the whole model. ``fixed`` are the arguments of its forward
    that are not tensors, and ``shapes`` those of the others: where Python needs a number that
    follows from shapes, it is that of these shapes, and the graph asserts it.
    """

    model: nn.Module
    path: str
    table: FxTable
    fixed: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, Shapes] = field(default_factory=dict)

    @property
    def module(self) -> nn.Module:
        return self.model.get_submodule(self.path)

    @classmethod
    def called(cls, model: nn.Module, path: str, inputs: Inputs, table: FxTable) -> Subject:
        """As it is called with these inputs.

        Raises ``TraceError`` if ``*args`` or ``**kwargs`` of its forward are used.
        """
        check_named(model, path, inputs)
        module = model.get_submodule(path)
        return cls(model, path, table, constants(module, inputs), shapes_of(module, inputs))

    @classmethod
    def recorded(cls, model: nn.Module, part: TracedPart, table: FxTable) -> Subject:
        """As it was when a model was stored."""
        return cls(model, part.path, table, part.constants, part.shapes)


@dataclass(frozen=True, slots=True, eq=False)
class Traced:
    """The graph of a subject, and the scopes of its nodes, relative to the submodule."""

    subject: Subject
    graph_module: fx.GraphModule
    scopes: Scopes


def trace_part(
    model: nn.Module, path: str, inputs: Inputs, table: FxTable, sizes: Collection[str] = ()
) -> Traced:
    """As `trace`, for a call. Numbers in ``sizes`` are inputs of the graph if that can be traced.

    Raises ``TraceError`` like `trace` and `Subject.called`.
    """
    subject = Subject.called(model, path, inputs, table)
    if sizes:
        rest = {name: value for name, value in subject.fixed.items() if name not in sizes}
        with suppress(TraceError):
            return trace(replace(subject, fixed=rest))
    return trace(subject)


def trace(subject: Subject) -> Traced:
    """The graph of a copy of a submodule, in eval mode, which shares the parameters.

    Dead code is dropped. Raises ``TraceError`` with the submodule and the line that cannot be
    traced.
    """
    model, path = subject.model, subject.path
    try:
        tracer, root, graph = _traced(subject)
    except _TracingError as failure:
        raise untraceable(failure.error, path, failure.at, model) from failure.error
    try:
        _keep_assertions(graph)
        _check_names(graph, path)
        rename_taken(graph, root)
        graph_module = fx.GraphModule(root, graph)
        has_changed = spell_out_changes(graph_module, tracer.node_name_to_scope)
        if graph.eliminate_dead_code() or has_changed:
            graph_module.recompile()
    except TraceError:
        raise
    except Exception as error:
        raise untraceable(error, path, joined(path, tracer.path), model) from error
    return Traced(subject, graph_module, tracer.node_name_to_scope)


def line_of(subject: Subject, node: fx.Node) -> str | None:
    """The line of the model's code that made a node of `trace`, or the last one before it.

    It is traced again for that, as noting the lines takes much longer than tracing.
    """
    lines_of: dict[str, str | None] = {}
    with suppress(_TracingError):
        _traced(subject, lines=lines_of)
    names = [each.name for each in takewhile(lambda each: each is not node, node.graph.nodes)]
    lines = [line for name in (*names, node.name) if (line := lines_of.get(name))]
    return lines[-1] if lines else None


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

    ``trained`` are the paths of the modules that are in training mode then. ``other`` is the path
    of a module that takes a different branch, or None; ``momenta`` maps the names of the BatchNorms
    that are functions, and update their statistics in training mode, to their momentum in it;
    ``drops`` maps the names of the functions that return their input in eval mode, and are called
    otherwise in training mode, to that call. ``ungraded`` are the paths of modules that compute
    with parameters that learn where gradients are off.
    """

    trained: Collection[str]
    other: str | None
    momenta: Mapping[str, Any] = field(default_factory=dict)
    drops: Mapping[str, fx.Node] = field(default_factory=dict)
    ungraded: tuple[str, ...] = ()


def in_training(traced: Traced) -> InTraining:
    """Compare the traces of a submodule in both modes, given the one in eval mode with values.

    Of a model in training mode, the modules in eval mode stay in it, as do those that its
    ``train()`` leaves in eval mode.
    """
    subject, path, model = traced.subject, traced.subject.path, traced.subject.model
    # the paths of the modules that are in training mode while the model is trained
    probe = model if model.training else runnable_copy(model).train()
    named_modules = probe.named_modules(remove_duplicate=False)
    trained = frozenset(name for name, module in named_modules if module.training)
    idle = {
        node.name
        for node in traced.graph_module.graph.nodes
        if node.op == "call_function" and node.meta["value"].is_input
    }
    try:
        tracer_in_eval, _, graph_in_eval = _traced(subject)
        tracer, _, graph = _traced(subject, trained=trained, whole=tracer_in_eval.idle)
    except _TracingError as failure:
        raise_lack_of_memory(failure.error)
        return InTraining(trained, failure.at)
    twins = {node.name: node for node in graph.nodes}
    pairs = [(node, twins[node.name]) for node in graph_in_eval.nodes if node.name in twins]
    momenta = {
        node.name: arguments(other).get("momentum")
        for node, other in pairs
        if node.target in BATCH_NORMS and flag(other) is True and flag(node) is not True
    }
    drops = {
        node.name: other
        for node, other in pairs
        if node.name in idle
        and told(node, idle) == told(other, idle)
        and str((node.args, node.kwargs)) != str((other.args, other.kwargs))
    }
    # what is only called in training mode, or the innermost of both
    calls = (_calls(graph_in_eval, tracer_in_eval, path, idle), _calls(graph, tracer, path, idle))
    other = next(
        (
            str(max(after[0], before[0], key=len))
            for before, after in zip_longest(*calls, fillvalue=(path,))
            if before[1:] != after[1:]
        ),
        None,
    )
    ungraded = tuple(joined(path, each) for each in tracer.ungraded)
    return InTraining(trained, other, momenta, drops, ungraded)


def _calls(
    graph: fx.Graph, tracer: Tracer, path: str, idle: Collection[str]
) -> Iterator[tuple[Any, ...]]:
    """The path of the module that makes each call of a graph, and what is called."""
    scopes = tracer.node_name_to_scope
    for node in graph.nodes:
        if node.name in scopes and node.op.startswith("call"):
            yield (joined(path, scopes[node.name][0]), node.op, *told(node, idle))
    yield (path, "output", *told(graph.output_node(), idle))


class _TracingError(Exception):
    """Tracing failed in the forward of the module ``at``."""

    def __init__(self, error: Exception, at: str) -> None:
        super().__init__(str(error))
        self.error, self.at = error, at


def _traced(
    subject: Subject,
    *,
    trained: Collection[str] = (),
    whole: Collection[str] = (),
    lines: dict[str, str | None] | None = None,
) -> tuple[Tracer, nn.Module, fx.Graph]:
    """Trace a copy of a submodule; ``lines`` get the lines that made the nodes, by name.

    The modules at the paths ``trained``, from the whole model, are in training mode, all others in
    eval mode. Those at the paths ``whole`` are not traced through.

    If it fails, it is tried again with known shapes; first with buffers as nodes: code like
    ``self.mask[:x.size(1)]`` cuts the buffer to any size then. Raises ``_TracingError`` for the
    first failure.
    """
    failure: _TracingError | None = None
    path, shapes = subject.path, subject.shapes
    for buffers_are_nodes, known in ((False, None), (True, shapes), (False, shapes)):
        tracer = _tracer(subject.model, path, subject.table)
        tracer.proxy_buffer_attributes = buffers_are_nodes
        tracer.shapes = known
        tracer.lines, tracer.whole = lines, whole
        root = _traceable_copy(subject.module)
        for name, module in root.named_modules(remove_duplicate=False):
            module.training = joined(path, name) in trained
        try:
            return tracer, root, tracer.trace(root, dict(subject.fixed))
        except Exception as error:
            if failure is None or isinstance(error, BatchSizeError):
                failure = _TracingError(error, joined(path, tracer.path))
    assert failure is not None
    raise failure


def _traceable_copy(module: nn.Module) -> nn.Module:
    """A copy of a submodule without what only hinders tracing it."""
    root = runnable_copy(module)
    for module in root.modules():
        # leftovers of an earlier prepare would look like our decisions
        module.__dict__.pop("qconfig", None)
        is_norm = isinstance(module, nn.modules.batchnorm._NormBase)
        if is_norm and not type(module).__module__.startswith("torch.nn."):
            # the forward that a subclass inherits branches on the rank
            vars(module)["_check_input_dim"] = lambda input: None
    swap_float_functional(root)
    return root


def _keep_assertions(graph: fx.Graph) -> None:
    """Replace assertions that something is None with those that do not count as dead code."""
    for node in list(graph.nodes):
        if node.target is assert_is_none:
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
        raise TraceError.of("QR305", what, hint="rename it")


def _is_spelt_by_code(part: str) -> bool:
    """Whether a name can be written as an identifier, or in the quotes that FX uses."""
    try:
        read = ast.parse(part if part.isidentifier() else f'"{part}"', mode="eval").body
    except (SyntaxError, ValueError):
        return False
    return part == (read.id if isinstance(read, ast.Name) else getattr(read, "value", None))


def _tracer(model: nn.Module, path: str, table: FxTable) -> Tracer:
    """A tracer of the submodule at ``path``. Raises ``PlanError`` (QR301) for unknown names."""
    names, classes = table.non_traceable_module_name, table.non_traceable_module_class
    modules = dict(model.named_modules())
    by_name = {
        name: type(module)
        for module in modules.values()
        for name in class_names(class_of_the_caller(module))
    }
    _check_known("fx.non_traceable_module_name", names, modules, "module of the model")
    _check_known(
        "fx.non_traceable_module_class", classes, by_name, "class of any module of the model"
    )
    within = f"{path}." if path else ""
    return Tracer([name.removeprefix(within) for name in names], [by_name[k] for k in classes])


def _check_known(key: str, names: Sequence[str], known: Collection[str], what: str) -> None:
    missing = [
        Finding("QR301", f'{key} "{name}" is not a {what}', hint=did_you_mean(name, known), key=key)
        for name in names
        if name not in known
    ]
    if missing:
        raise error_from(missing)
