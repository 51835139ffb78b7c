"""Graph rewrites that spell every call as backends have a pattern for."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qrecipe.model.changes import gives_parts
from qrecipe.model.copies import structural_copy
from qrecipe.model.nodes import (
    called_modules,
    free_name,
    module_of,
    readers_of_values,
    store,
    stored,
)
from qrecipe.model.outputs import is_packing, name_constants

_TWIN_OF_METHOD: dict[str, Any] = {
    "add": torch.add,
    **dict.fromkeys(("clamp", "clip"), torch.clamp),
    "flatten": torch.flatten,
    "hardsigmoid": F.hardsigmoid,
    "matmul": torch.matmul,
    "mean": torch.mean,
    "mul": torch.mul,
    "relu": F.relu,
    "repeat_interleave": torch.repeat_interleave,
    "sigmoid": torch.sigmoid,
    "squeeze": torch.squeeze,
    "tanh": torch.tanh,
    "transpose": torch.transpose,
    "unsqueeze": torch.unsqueeze,
}
"""Functions that backends have a pattern for, by the equivalent method."""

_TWIN_OF_FUNCTION: dict[Any, Any] = {
    operator.matmul: torch.matmul,
    torch.relu: F.relu,
    torch.clip: torch.clamp,
    F.sigmoid: torch.sigmoid,
    F.tanh: torch.tanh,
    torch.concat: torch.cat,
    torch.concatenate: torch.cat,
    torch.max_pool1d: F.max_pool1d,
    torch.max_pool2d: F.max_pool2d,
    torch.max_pool3d: F.max_pool3d,
}

_TWIN_OUT_OF_PLACE: dict[Any, Any] = {
    **dict.fromkeys((torch.relu_, F.relu_), F.relu),
    F.leaky_relu_: F.leaky_relu,
}
"""For inputs that share memory with no other tensor, which would change with them."""

_JOINED_AT: dict[Any, tuple[int, int]] = {
    torch.hstack: (1, 2),
    torch.vstack: (0, 2),
    torch.row_stack: (0, 2),
    torch.column_stack: (1, 2),
    torch.dstack: (2, 3),
}
"""Where functions join what has at least so many dimensions, as ``torch.cat`` does."""

_BINARY_FUNCTIONS = frozenset({torch.add, torch.mul, torch.matmul})
_WEIGHTED = ("input", "weight", "bias")
_CONVOLUTION = (*_WEIGHTED, "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_WEIGHTED, "stride", "padding", "output_padding", "groups", "dilation")

MULTIPLIES_WEIGHT: dict[Any, tuple[str, ...]] = {
    F.linear: _WEIGHTED,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONVOLUTION),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _TRANSPOSED),
}
"""Linear layers and convolutions as functions, with their arguments in torch's order."""

_POSITIONAL: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys(_BINARY_FUNCTIONS, ("input", "other")),
    **dict.fromkeys((torch.cat, torch.stack), ("tensors", "dim")),
    **dict.fromkeys(_JOINED_AT, ("tensors",)),
}

TAKES_WEIGHT = frozenset(
    (*MULTIPLIES_WEIGHT, F.layer_norm, F.instance_norm, F.group_norm, F.batch_norm, F.embedding)
)
"""Functions with weight and bias as arguments."""


def normalize(graph_module: fx.GraphModule) -> None:
    """Rewrite the graph in place; what it computes stays the same. Its code is not made again.

    Calls must have their addresses, and values must have been recorded by
    `trace_proof.record_values`.
    """
    _separate_shared_modules(graph_module)
    _separate_tied_weights(graph_module)
    for node in graph_module.graph.nodes:
        if node.op == "call_method":
            _method_to_function(node)
        elif node.op == "call_module":
            _spell_out_module(node, module_of(node))
        if node.op == "call_function" and not is_packing(node):
            node.target = _TWIN_OF_FUNCTION.get(node.target, node.target)
            if node.target in _TWIN_OUT_OF_PLACE and _is_fresh(node.args[0]):
                node.target = _TWIN_OUT_OF_PLACE[node.target]
            _spell_out(node, _POSITIONAL.get(node.target, ("input",)))
            _joining_to_cat(node)
            if node.target in _BINARY_FUNCTIONS and node.kwargs.get("alpha") == 1:
                node.kwargs = {key: each for key, each in node.kwargs.items() if key != "alpha"}
            elif node.target is F.leaky_relu:
                _spell_out_leaky_relu(node)
    name_constants(graph_module)


def _separate_shared_modules(graph_module: fx.GraphModule) -> None:
    """Give each further call of a module its own module that shares the tensors.

    Fusion and observers are per module: otherwise two calls would share a fused ReLU and a range.
    """
    called: set[str] = set()
    for node, module in called_modules(graph_module.graph):
        if node.target in called:
            node.target = free_name(graph_module, str(node.target))
            graph_module.add_submodule(node.target, structural_copy(module))
        called.add(str(node.target))


def _separate_tied_weights(graph_module: fx.GraphModule) -> None:
    """Let other readers of a called module's weight read the same tensor by another name.

    Conversion packs the weights of modules, so they can no longer be read.
    """
    nodes = list(graph_module.graph.nodes)
    called = {node.target for node in nodes if node.op == "call_module"}
    for node in nodes:
        if node.op == "get_attr" and str(node.target).rpartition(".")[0] in called:
            tensor = stored(node)
            node.target = store(tensor, str(node.target).replace(".", "_"), graph_module)


def _is_fresh(source: Any) -> bool:
    """Whether a tensor is new, as what weights compute is, and read by one node alone."""
    module = module_of(source) if isinstance(source, fx.Node) else None
    return module is not None and len(source.users) == 1 and any(True for _ in module.parameters())


def _method_to_function(node: fx.Node) -> None:
    twin = _TWIN_OF_METHOD.get(str(node.target))
    if twin is not None:
        node.op, node.target = "call_function", twin
    elif node.target == "view" and not any(isinstance(arg, torch.dtype) for arg in node.args):
        # a quantized convolution returns channels_last, which view does not support
        node.target = "reshape"


def _joining_to_cat(node: fx.Node) -> None:
    dim, least = _JOINED_AT.get(node.target, (0, 0))
    if not least or len(node.args) != 1:
        return
    joined: Any = node.args[0]
    if isinstance(joined, fx.Node):  # parts have the dimensions of the whole
        if not gives_parts(joined):
            return
        joined = joined.args[:1]
    ranks = [each.meta["value"].rank for each in joined if isinstance(each, fx.Node)]
    if ranks and all(rank is not None and rank >= least for rank in ranks):
        node.target, node.args = torch.cat, (*node.args, dim)


def _spell_out_module(node: fx.Node, module: nn.Module) -> None:
    """Make arguments positional; a flatten module becomes the function that backends know."""
    parameters = inspect.signature(module.forward).parameters.values()
    _spell_out(node, tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD))
    if type(module) is nn.Flatten:
        node.op, node.target = "call_function", torch.flatten
        node.args = (*node.args, module.start_dim, module.end_dim)
    elif type(module) is nn.LeakyReLU:
        module.inplace = False  # or its kernel would warn at each call that it is not in place
    else:
        padding_in_numbers(module)


def _spell_out_leaky_relu(node: fx.Node) -> None:
    """Its kernel needs all arguments, and warns at each call that it is not in place."""
    given = dict(zip(("negative_slope", "inplace"), node.args[1:], strict=False))
    kwargs = {"negative_slope": 0.01, **given, **node.kwargs, "inplace": False}
    node.args, node.kwargs = node.args[:1], kwargs


def _spell_out(node: fx.Node, names: tuple[str, ...]) -> None:
    """Make arguments positional, as patterns expect them: ``F.linear(input=x, weight=w)``."""
    args, kwargs = list(node.args), dict(node.kwargs)
    for name in names[len(args) :]:
        if name not in kwargs:
            break
        args.append(kwargs.pop(name))
    node.args, node.kwargs = tuple(args), kwargs


def padding_in_numbers(module: nn.Module) -> None:
    """Let a convolution have padding that is given as a word in numbers, as kernels need.

    That is possible if it is symmetric.
    """
    if not isinstance(module, nn.modules.conv._ConvNd) or not isinstance(module.padding, str):
        return
    sizes = zip(module.dilation, module.kernel_size, strict=True)
    totals = [0 if module.padding == "valid" else d * (k - 1) for d, k in sizes]
    if not any(total % 2 for total in totals):
        module.padding = tuple(total // 2 for total in totals)


_KEEPS_SHAPE = (nn.modules.batchnorm._BatchNorm, nn.ReLU)


def let_shapes_be_read_later(graph_module: fx.GraphModule) -> None:
    """Read shapes after BatchNorm and ReLU instead of before them, in place.

    torch only fuses what has a single reader, and a size or a check of the rank is one.
    """
    for node in list(graph_module.graph.nodes):
        readers = readers_of_values(node)
        if len(readers) == len(node.users) or len(readers) != 1:
            continue
        (reader,) = readers
        if reader.target is F.relu or isinstance(module_of(reader), _KEEPS_SHAPE):
            node.append(reader)
            node.replace_all_uses_with(reader, lambda user, reader=reader: user is not reader)
