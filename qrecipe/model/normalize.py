"""Graph rewrites that spell every call as backends have a pattern for."""

from __future__ import annotations

import inspect
import operator
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qrecipe.model.changes import gives_parts
from qrecipe.model.copies import structural_copy
from qrecipe.model.outputs import is_packing, name_constants
from qrecipe.rules.structure import joined

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
_POSITIONAL: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys(_BINARY_FUNCTIONS, ("input", "other")),
    F.linear: _WEIGHTED,
    torch.cat: ("tensors", "dim"),
    **dict.fromkeys(_JOINED_AT, ("tensors",)),
    torch.stack: ("tensors", "dim"),
}
_SETTINGS = ("stride", "padding", "dilation", "groups")
_TRANSPOSED_SETTINGS = ("stride", "padding", "output_padding", "groups", "dilation")
_CONVOLUTIONS: dict[Any, tuple[int, tuple[str, ...]]] = {
    F.conv1d: (1, _WEIGHTED + _SETTINGS),
    F.conv2d: (2, _WEIGHTED + _SETTINGS),
    F.conv3d: (3, _WEIGHTED + _SETTINGS),
    F.conv_transpose1d: (1, _WEIGHTED + _TRANSPOSED_SETTINGS),
    F.conv_transpose2d: (2, _WEIGHTED + _TRANSPOSED_SETTINGS),
    F.conv_transpose3d: (3, _WEIGHTED + _TRANSPOSED_SETTINGS),
}
"""The number of dimensions, and the arguments in torch's order, which differs."""

_DEFAULTS = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1}

MULTIPLIES_WEIGHT = frozenset({F.linear, *_CONVOLUTIONS})
"""Linear layers and convolutions as functions."""

TAKES_WEIGHT = MULTIPLIES_WEIGHT | {
    *(F.layer_norm, F.instance_norm, F.group_norm, F.batch_norm, F.embedding)
}
"""Functions with weight and bias as arguments."""


def normalize(graph_module: fx.GraphModule) -> None:
    """Rewrite the graph in place; what it computes stays the same. Its code is not made again.

    Calls must have their addresses, and values must have been recorded by
    `trace_proof.record_values`.
    """
    _separate_shared_modules(graph_module)
    _separate_tied_weights(graph_module)
    _separate_readers_of_weights(graph_module.graph)
    for node in graph_module.graph.nodes:
        if node.op == "call_method":
            _method_to_function(node)
        elif node.op == "call_module":
            module = graph_module.get_submodule(node.target)
            _spell_out(node, _positional(module))
            _module_to_function(node, module)
        if node.op == "call_function" and not is_packing(node):
            node.target = _TWIN_OF_FUNCTION.get(node.target, node.target)
            if node.target in _TWIN_OUT_OF_PLACE and _is_fresh(node.args[0], graph_module):
                node.target = _TWIN_OUT_OF_PLACE[node.target]
            _spell_out(node, _POSITIONAL.get(node.target, ("input",)))
            _joining_to_cat(node)
            if node.target in _BINARY_FUNCTIONS:
                _drop_neutral_alpha(node)
            elif node.target in _CONVOLUTIONS:
                _spell_out_convolution(node, *_CONVOLUTIONS[node.target])
                _spell_out_word(node, graph_module)
        if node.op == "call_module":
            _spell_out_padding(graph_module.get_submodule(node.target))
        _leaky_relu_out_of_place(node, graph_module)
    name_constants(graph_module)


def stored(source: object, graph_module: fx.GraphModule) -> Any:
    """What a ``get_attr`` node reads: a parameter, a buffer or another attribute.

    None for all other nodes, and for arguments that are not nodes.
    """
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    owner, name = stored_in(source, graph_module)
    return getattr(owner, name)


def stored_value(argument: Any, graph_module: fx.GraphModule) -> Any:
    """The tensor that an argument of a call reads, or the argument itself."""
    return stored(argument, graph_module) if isinstance(argument, fx.Node) else argument


def stored_in(node: fx.Node, graph_module: fx.GraphModule) -> tuple[nn.Module, str]:
    """The module whose attribute a ``get_attr`` node reads, and the name of the attribute."""
    path, _, name = str(node.target).rpartition(".")
    return graph_module.get_submodule(path), name


def _separate_shared_modules(graph_module: fx.GraphModule) -> None:
    """Give each further call of a module its own module that shares the tensors.

    Fusion and observers are per module: otherwise two calls would share a fused ReLU and a range.
    """
    called: set[str] = set()
    for node in graph_module.graph.nodes:
        if node.op != "call_module":
            continue
        if node.target not in called:
            called.add(node.target)
            continue
        twin = free_name(graph_module, node.target)
        graph_module.add_submodule(twin, structural_copy(graph_module.get_submodule(node.target)))
        node.target = twin
        called.add(twin)


def _separate_tied_weights(graph_module: fx.GraphModule) -> None:
    """Let other readers of a called module's weight read the same tensor by another name.

    Conversion packs the weights of modules, so they can no longer be read.
    """
    nodes = list(graph_module.graph.nodes)
    called = {node.target for node in nodes if node.op == "call_module"}
    for node in nodes:
        if node.op != "get_attr" or str(node.target).rpartition(".")[0] not in called:
            continue
        tensor = stored(node, graph_module)
        alias = free_name(graph_module, str(node.target).replace(".", "_"))
        if isinstance(tensor, nn.Parameter):
            graph_module.register_parameter(alias, tensor)
        else:
            graph_module.register_buffer(alias, tensor)
        node.target = alias


def _separate_readers_of_weights(graph: fx.Graph) -> None:
    """Give each reader of a function's weight its own node: torch folds the weight away."""
    for node in list(graph.nodes):
        if node.op != "get_attr" or not any(user.target in TAKES_WEIGHT for user in node.users):
            continue
        for user in list(node.users)[1:]:
            with graph.inserting_before(node):
                twin = graph.node_copy(node)
            user.replace_input_with(node, twin)


def free_name(graph_module: fx.GraphModule, path: str) -> str:
    """A name after ``path`` that no module, parameter or buffer of the graph has yet."""
    outer, _, name = path.rpartition(".")
    owner = graph_module.get_submodule(outer)
    taken = {*owner._modules, *owner._parameters, *owner._buffers}
    free = next(free for k in count(1) if (free := f"{name}__call{k}") not in taken)
    return joined(outer, free)


def _is_fresh(source: Any, graph_module: fx.GraphModule) -> bool:
    """Whether a tensor is new, as what weights compute is, and read by one node alone."""
    if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
        return False
    return any(True for _ in graph_module.get_submodule(str(source.target)).parameters())


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


def _module_to_function(node: fx.Node, module: nn.Module) -> None:
    """Replace a flatten module with the function, for which backends have a pattern."""
    if type(module) is nn.Flatten:
        node.op, node.target = "call_function", torch.flatten
        node.args = (*node.args, module.start_dim, module.end_dim)


def _leaky_relu_out_of_place(node: fx.Node, graph_module: fx.GraphModule) -> None:
    """Its kernel needs all arguments, and warns at each call that it is not in place."""
    if node.op == "call_module":
        module = graph_module.get_submodule(str(node.target))
        if type(module) is nn.LeakyReLU:
            module.inplace = False
    if node.target is not F.leaky_relu:
        return
    given = dict(zip(("negative_slope", "inplace"), node.args[1:], strict=False))
    kwargs = {"negative_slope": 0.01, **given, **node.kwargs, "inplace": False}
    node.args, node.kwargs = node.args[:1], kwargs


def _spell_out_convolution(node: fx.Node, dimensions: int, names: tuple[str, ...]) -> None:
    """Write all arguments positionally and as tuples, as the quantized prepack operators need."""
    given = {**_DEFAULTS, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    for name in _DEFAULTS.keys() - {"groups"}:
        given[name] = _for_each_dimension(given[name], dimensions)
    node.args, node.kwargs = tuple(given.get(name) for name in names), {}


def _for_each_dimension(value: Any, dimensions: int) -> Any:
    if isinstance(value, int):
        return (value,) * dimensions
    is_single = isinstance(value, (tuple, list)) and len(value) == 1
    return tuple(value) * dimensions if is_single else value


def _positional(module: nn.Module) -> tuple[str, ...]:
    """The names of the positional parameters of a module's forward."""
    parameters = inspect.signature(module.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def _spell_out(node: fx.Node, names: tuple[str, ...]) -> None:
    """Make arguments positional, as patterns expect them: ``F.linear(input=x, weight=w)``."""
    args, kwargs = list(node.args), dict(node.kwargs)
    for name in names[len(args) :]:
        if name not in kwargs:
            break
        args.append(kwargs.pop(name))
    node.args, node.kwargs = tuple(args), kwargs


def _drop_neutral_alpha(node: fx.Node) -> None:
    if node.kwargs.get("alpha") == 1:
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "alpha"}


def _spell_out_padding(module: nn.Module) -> None:
    """Replace padding given as a string with numbers if it is symmetric, as kernels need."""
    if isinstance(module, nn.modules.conv._ConvNd) and isinstance(module.padding, str):
        module.padding = _in_numbers(module.padding, module.kernel_size, module.dilation)


def _spell_out_word(node: fx.Node, graph_module: fx.GraphModule) -> None:
    """The same for a functional convolution, whose arguments are positional already."""
    weight, word = stored(node.args[1], graph_module), node.args[4]
    if not isinstance(word, str) or weight is None:
        return
    padding = _in_numbers(word, tuple(weight.shape[2:]), node.args[5])
    node.args = (*node.args[:4], padding, *node.args[5:])


def _in_numbers(word: str, kernel: tuple[int, ...], dilation: Any) -> Any:
    if word == "valid":
        return (0,) * len(kernel)
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return word if any(total % 2 for total in totals) else tuple(total // 2 for total in totals)
