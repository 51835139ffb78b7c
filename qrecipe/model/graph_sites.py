"""Model -> sites: traced, normalised and fused exactly as FX graph mode executes it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from qrecipe._torch_fx import (
    BackendConfig,
    DTypeConfig,
    QuantizeHandler,
    _sorted_patterns_dict,
    fuse,
)
from qrecipe.errors.findings import Finding, PlanError
from qrecipe.errors.text import first_line
from qrecipe.model.addresses import address, is_floating, is_plumbing, members_of, unpacked
from qrecipe.model.altered_modules import keep_apart
from qrecipe.model.architecture import traced_part
from qrecipe.model.caches import with_caches_filled
from qrecipe.model.call import Inputs
from qrecipe.model.class_names import base_names, class_names
from qrecipe.model.copies import structural_copy
from qrecipe.model.graph_names import keep_state_names, outer
from qrecipe.model.matching import (
    dtype_configs,
    fusions_in,
    modules_as_trained,
    quantizable_in,
    quantize_handlers,
    root_getters,
)
from qrecipe.model.moving import PIECE, moved, spell_out_moves
from qrecipe.model.nodes import module_of
from qrecipe.model.normalize import TAKES_WEIGHT, let_shapes_be_read_later, normalize
from qrecipe.model.opened.whole import class_of_the_caller
from qrecipe.model.outputs import is_packing
from qrecipe.model.record import TracedPart
from qrecipe.model.rewrite_proof import is_proven_by, prove_fused
from qrecipe.model.rewrites.activations import activations_as_calls
from qrecipe.model.rewrites.batch_norms import (
    IN_TRAINING,
    batch_norms_as_modules,
    frozen_in_training,
)
from qrecipe.model.rewrites.channel_arithmetic import fold_channel_arithmetic
from qrecipe.model.rewrites.constants import fold_constants
from qrecipe.model.rewrites.no_ops import drop_no_ops
from qrecipe.model.rewrites.weighted_layers import (
    products_as_linear,
    weighted_layers_as_modules,
)
from qrecipe.model.roots import inputs_of_roots, prove_whole, sizes_of_roots
from qrecipe.model.scaled_input import SCALES, spell_out_scales
from qrecipe.model.trace import InTraining, Traced, hook_findings, in_training, trace_part
from qrecipe.model.trace_proof import Example, record_values
from qrecipe.model.unfit import unfit
from qrecipe.process.state import alone, replaced
from qrecipe.recipe.schema import FxTable, Phase
from qrecipe.rules.structure import Kind, Member, ModelStructure, Operation


@dataclass(frozen=True, slots=True)
class Match:
    """An operation in a fused graph: its nodes in order, and what its backend's kernels take.

    ``module`` is what the first node calls, the first one of a fused module, and None for a
    function; it may stand for a function of the model, and then is no ``layer``. ``whole`` says why
    it is a layer that holds layers and is not opened. ``shape`` is that of its first input for the
    example, where that is known.
    """

    operation: Operation
    nodes: tuple[fx.Node, ...]
    module: nn.Module | None
    kernels: tuple[DTypeConfig, ...]
    whole: str | None = None
    shape: tuple[int, ...] | None = None

    @property
    def layer(self) -> nn.Module | None:
        """The module, unless the model calls a function there."""
        return None if self.operation.members[0].module is None else self.module

    @property
    def has_weights(self) -> bool:
        """Whether a module multiplies with a matrix or a kernel; a norm only scales."""
        return self.module is not None and any(p.dim() > 1 for p in self.module.parameters())


@dataclass(frozen=True, slots=True)
class Part:
    """A part that is quantized, the whole model or a root: its fused graph and its inputs.

    ``path`` is empty for the whole model. ``graph_module`` shares the unfused parameters with the
    caller's model and belongs to the owner of the inventory. Each node of a site has its name in
    ``meta["site"]``. ``traced`` records the traced graph, ``example`` the expected output.
    """

    path: str
    graph_module: fx.GraphModule
    inputs: Inputs
    traced: TracedPart
    example: Example


@dataclass(frozen=True, slots=True)
class Inventory:
    """The parts of a ``model`` and all their sites, in order of execution within a part.

    The model is the caller's with the layers at the paths ``opened`` opened.

    ``trained_otherwise`` are the paths of modules that compute something else in training mode,
    only determined for training, as are those that compute without gradients what would learn,
    ``ungraded``. ``untraced`` says why there are no parts; ``doubts`` are warnings
    about the model itself.
    """

    model: nn.Module
    parts: tuple[Part, ...]
    matches: Mapping[str, Match]
    structure: ModelStructure
    opened: tuple[str, ...] = ()
    trained_otherwise: tuple[str, ...] = ()
    ungraded: tuple[str, ...] = ()
    untraced: Finding | None = None
    unreached: tuple[str, ...] = ()
    doubts: tuple[Finding, ...] = ()


Tracing = Callable[[nn.Module, str, Inputs, FxTable, Collection[str]], Traced]
"""What makes the graph of a part, as `trace.trace_part` does."""


def take_inventory(
    model: nn.Module,
    inputs: Inputs,
    table: FxTable,
    backend_config: BackendConfig,
    phase: Phase,
    tracing: Tracing = trace_part,
) -> Inventory:
    """Trace, normalise and fuse copies of the model's parts, and find their sites.

    In ``phase`` qat, the parts are in training mode, and BatchNorm is fused but not folded. Caches
    that the parts fill on their first call are filled, so that it makes no difference whether the
    model has run before. ``tracing`` makes the graph of a part. `prove` has to show that the fused
    graphs compute what the model does.

    Raises ``TraceError`` or ``PlanError`` like `trace.trace_part`, `trace_proof.record_values` and
    `roots.inputs_of_roots`.
    """
    inputs_of = inputs_of_roots(model, inputs, table.roots) if table.roots else {"": inputs}
    try:
        return _inventory(model, inputs, inputs_of, table, backend_config, phase, tracing)
    except PlanError:
        filled = with_caches_filled(model, inputs_of)
        if filled is None:
            raise
    return _inventory(filled, inputs, inputs_of, table, backend_config, phase, tracing)


def _inventory(
    model: nn.Module,
    inputs: Inputs,
    inputs_of: Mapping[str, Inputs],
    table: FxTable,
    backend_config: BackendConfig,
    phase: Phase,
    tracing: Tracing,
) -> Inventory:
    sizes_of = sizes_of_roots(model, inputs, inputs_of) if table.roots else {}
    parts: list[Part] = []
    trained: list[str] = []
    ungraded: list[str] = []
    idle: list[Member] = []
    matches: dict[str, Match] = {}
    for path, part_inputs in inputs_of.items():
        module, sizes = model.get_submodule(path), sizes_of.get(path, ())
        traced = tracing(model, path, part_inputs, table, sizes)
        example = record_values(traced.graph_module, module, part_inputs)
        record = traced_part(traced)
        training = in_training(traced) if phase == "qat" else None
        graph_module, dropped = fused_graph(traced, backend_config, training)
        idle += dropped
        if training is not None:
            trained += [] if training.other is None else [training.other]
            trained += frozen_in_training(graph_module, training.momenta)
            ungraded += training.ungraded
        parts.append(Part(path, graph_module, part_inputs, record, example))
        batch_sizes = example.inputs.batch_size, part_inputs.batch_size
        for name, match in named_sites(graph_module, backend_config, phase).items():
            matches[name] = replace(match, shape=_shape(match, *batch_sizes))
    return Inventory(
        model,
        tuple(parts),
        matches,
        structure_of(model, matches, table.roots, idle),
        trained_otherwise=tuple(trained),
        ungraded=tuple(ungraded),
        doubts=tuple(
            finding for path in inputs_of for finding in hook_findings(model, path, table)
        ),
    )


def prove(inventory: Inventory, inputs: Inputs) -> None:
    """Compare the fused graphs with the caller's model, and the whole with graphs for its roots.

    Raises ``PlanError`` like `rewrite_proof.prove_fused` and `roots.prove_whole`.
    """
    for part in inventory.parts:
        prove_fused(part.graph_module, inventory.model, part.path, part.example)
    if inventory.structure.roots:
        graphs = {part.path: part.graph_module for part in inventory.parts}
        prove_whole(inventory.model, graphs, inputs)


def prove_by_call(inventory: Inventory, calls: Mapping[str, Example]) -> None:
    """As `prove`, by a call of each part's prepared graph; it is run where that proves nothing.

    Raises ``PlanError`` like `rewrite_proof.prove_fused`.
    """
    for part in inventory.parts:
        call = calls.get(part.path)
        if call is None or not is_proven_by(call, part.example):
            prove_fused(part.graph_module, inventory.model, part.path, part.example)


def _shape(match: Match, few: int | None, all_samples: int | None) -> tuple[int, ...] | None:
    """The shape of a match's first input, with all samples instead of a few."""
    sources = match.nodes[0].all_input_nodes
    value = sources[0].meta.get("value") if sources else None
    if value is None or not value.shape:
        return None
    sizes: list[int] = list(value.shape)
    if few and all_samples and len(sizes) > 1:
        batch = sizes.index(few) if few in sizes[:-1] else 0
        sizes[batch] = sizes[batch] * all_samples // few
    return tuple(sizes)


def fused_graph(
    traced: Traced, backend_config: BackendConfig, training: InTraining | None
) -> tuple[fx.GraphModule, tuple[Member, ...]]:
    """A traced graph with recorded values, normalised and fused, and the calls that have no site.

    ``training`` is how the graph differs in training mode, None if it won't be trained.
    """
    graph_module, path = traced.graph_module, traced.subject.path
    spell_out_scales(graph_module, path)
    address(graph_module, traced.scopes, path)
    idle = drop_no_ops(graph_module, path, training)
    idle += fold_constants(graph_module, is_trained=training is not None)
    batch_norms_as_modules(graph_module, path, training)
    normalize(graph_module)
    products_as_linear(graph_module)
    weighted_layers_as_modules(graph_module)
    patterns = dtype_configs(backend_config)
    activations_as_calls(graph_module, patterns)
    fold_channel_arithmetic(graph_module, patterns, is_trained=training is not None)
    if moved in patterns:
        spell_out_moves(graph_module, patterns)
    let_shapes_be_read_later(graph_module)
    keep_apart(graph_module)
    _note_fused_members(graph_module, backend_config)
    graph_module.train(training is not None)
    try:
        # torch would copy a weight that it replaces with the folded one
        sharing = SimpleNamespace(deepcopy=structural_copy)
        with alone(), replaced(fuse_conv_bn_eval.__globals__, {"copy": sharing}):
            fused = fuse(graph_module, training is not None, None, backend_config)
    except Exception as error:
        message = f"torch cannot fuse the model: {first_line(error)}"
        raise unfit(message, "please report the model") from error
    keep_state_names(fused)
    return fused, idle


def named_sites(
    graph_module: fx.GraphModule, backend_config: BackendConfig, phase: Phase
) -> dict[str, Match]:
    """The sites of a fused graph by name; their nodes are marked with it."""
    called = dict(graph_module.named_modules(remove_duplicate=False))
    if phase == "qat":
        called = modules_as_trained(called, backend_config)
    matches = _matches(graph_module, called, backend_config)
    found = {match.operation.name: match for match in matches}
    for name, match in found.items():
        for node in match.nodes:
            node.meta["site"] = name
    return found


def structure_of(
    model: nn.Module,
    matches: Mapping[str, Match],
    roots: Sequence[str] = (),
    idle: Sequence[Member] = (),
) -> ModelStructure:
    """The operations of all sites, the names of all modules, and the ``idle`` calls.

    A module in several roots has a canonical path in each, as each has its own sites.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    first: dict[tuple[nn.Module, str], str] = {}
    for path, module in named.items():
        first.setdefault((module, _root_of(path, roots)), path)
    in_a_root = {module: path for (module, root), path in reversed(first.items()) if root}
    canonical: dict[str, str] = {}
    for path, module in named.items():
        root = _root_of(path, roots)
        own = first[module, root]
        canonical[path] = own if root else in_a_root.get(module, own)
    modules = {path: named[path] for path, at in canonical.items() if at == path}
    return ModelStructure(
        tuple(match.operation for match in matches.values()),
        {
            path: class_names(class_of_the_caller(module)) | class_names(type(module))
            for path, module in modules.items()
        },
        {path: base_names(class_of_the_caller(module)) for path, module in modules.items()},
        {path: at for path, at in canonical.items() if at != path},
        tuple(roots),
        tuple(idle),
        tuple(_layers_outside(modules, roots)),
    )


def _layers_outside(modules: Mapping[str, nn.Module], roots: Sequence[str]) -> Iterator[str]:
    for path, module in modules.items():
        is_layer = not list(module.children()) and any(p.dim() > 1 for p in module.parameters())
        if roots and is_layer and not _root_of(path, roots):
            yield path


def _root_of(path: str, roots: Sequence[str]) -> str:
    return next((root for root in roots if path == root or path.startswith(f"{root}.")), "")


def _note_fused_members(graph_module: fx.GraphModule, backend_config: BackendConfig) -> None:
    """Record in the node that remains after fusion (the root's) which members it stands for."""
    get_root: dict[Any, Any] = root_getters(backend_config)
    groups: dict[fx.Node, list[fx.Node]] = {}
    roots: dict[fx.Node, fx.Node] = {}
    found = fusions_in(graph_module, backend_config)
    for node in graph_module.graph.nodes:
        if node.name in found:
            last, pattern, node_pattern, *_ = found[node.name]
            groups.setdefault(last, []).append(node)
            if node is last:  # the others only know their part of the pattern
                roots[last] = get_root.get(pattern, _innermost)(node_pattern)
    for last, nodes in groups.items():
        roots[last].meta["members"] = tuple(each for node in nodes for each in members_of(node))
        roots[last].meta["value"] = last.meta["value"]
        for node in nodes:
            roots[last].meta |= {key: node.meta[key] for key in IN_TRAINING if key in node.meta}


def _innermost(node_pattern: Any) -> fx.Node:
    while not isinstance(node_pattern, fx.Node):
        node_pattern = node_pattern[-1]
    return node_pattern


def _matches(
    fused: fx.GraphModule, modules: dict[str, nn.Module], backend_config: BackendConfig
) -> Iterator[Match]:
    """The sites of a fused graph, matched by the types of ``modules``."""
    handlers = _sorted_patterns_dict(quantize_handlers(backend_config))
    found = quantizable_in(fused.graph, modules, handlers, root_getters(backend_config))
    configs = dtype_configs(backend_config)
    position = {node: index for index, node in enumerate(fused.graph.nodes)}
    site_of: dict[fx.Node, str] = {}
    pieces: dict[Member, list[fx.Node]] = {}
    for node in fused.graph.nodes:
        if PIECE in node.meta:
            pieces.setdefault(node.meta["member"], []).append(node)
    for node in fused.graph.nodes:
        if "member" not in node.meta or node in site_of:
            continue
        alone = node, [node], None, None
        is_inserted = SCALES in node.meta
        _, node_pattern, pattern, handler = alone if is_inserted else found.get(node.name, alone)
        group = sorted(_nodes_of(node_pattern), key=position.__getitem__)
        group = pieces.get(node.meta["member"], group)
        kernels = () if pattern is None else tuple(configs[pattern])
        sources = _sources(group)
        operation = Operation(
            members=tuple(dict.fromkeys(member for n in group for member in members_of(n))),
            kind=_kind(handler, kernels),
            producers=tuple(dict.fromkeys(site_of[n] for n in sources if n in site_of)),
            model_inputs=tuple(str(n.target) for n in sources if n.op == "placeholder"),
            stored=tuple(outer(str(n.target)) for n in sources if n.op == "get_attr"),
            is_output=any(user.op == "output" for n in group for user in readers_of(n)),
            is_inserted=is_inserted,
        )
        site_of.update(dict.fromkeys(group, operation.name))
        module = module_of(group[0])
        first = module[0] if isinstance(module, nn.Sequential) else module
        yield Match(operation, tuple(group), first, kernels)


def _nodes_of(node_pattern: Any) -> Iterator[fx.Node]:
    if isinstance(node_pattern, fx.Node):
        yield node_pattern
    elif isinstance(node_pattern, (tuple, list)):
        for part in node_pattern:
            yield from _nodes_of(part)


def _kind(handler: QuantizeHandler | None, kernels: tuple[DTypeConfig, ...]) -> Kind:
    if handler is None:
        return "unmatched"
    if handler.is_general_tensor_value_op():
        return "passthrough"
    outputs = [kernel.output_dtype_with_constraints for kernel in kernels]
    return "fixed_qparams" if any(output.scale_exact_match for output in outputs) else "observed"


def readers_of(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that read a result, directly or through tuples and containers."""
    for user in node.users:
        yield from readers_of(user) if is_plumbing(user) or is_packing(user) else (user,)


def _sources(group: list[fx.Node]) -> list[fx.Node]:
    """The nodes outside the group whose floating-point tensors it reads, tuples unpacked."""
    found: dict[fx.Node, None] = {}
    for node in group:
        for source in node.all_input_nodes:
            source = unpacked(source)
            is_weight = source.op == "get_attr" and node.target in TAKES_WEIGHT
            if is_weight and source is not node.args[0]:
                continue
            if source not in group and is_floating(source):
                found[source] = None
    return list(found)
