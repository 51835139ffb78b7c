"""torch's packed weights, taken apart into plain tensors and packed again.

Each kind of packed weight is a row of `_KINDS`. What a kernel makes of its weight is private to an
engine; what goes in is a weight of integers with scales and zero points, and a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qrecipe.model.addresses import CALLS, site_of
from qrecipe.model.normalize import stored, stored_in
from qrecipe.planning.plan import Engine

Tensors = dict[str, Tensor]
"""Plain tensors by role: ``weight``, ``weight_scale``, ``weight_zero_point``, ``bias``."""

_ops: Any = torch.ops.quantized


@dataclass(frozen=True, slots=True)
class _Kind:
    """How to take one kind of packed weight apart, and how to pack tensors as another one is."""

    unpack: Callable[[Any], Tensors]
    pack: Callable[[Any, Tensors], Any]


def unpacked(packed: torch.ScriptObject) -> Tensors:
    """The plain tensors of a packed weight.

    Raises KeyError for a kind of packed weight that is not known.
    """
    return _KINDS[_name(packed)].unpack(packed)


def repacked(like: torch.ScriptObject, tensors: Tensors) -> torch.ScriptObject:
    """The tensors packed for the engine of the moment, with the settings of ``like``.

    Their roles, dtypes and shapes are those of ``unpacked(like)``.
    """
    found: torch.ScriptObject = _KINDS[_name(like)].pack(like, tensors)
    return found


def _name(packed: Any) -> str:
    return str(packed._type().name()) if hasattr(packed, "_type") else ""


def _integers(weight: Tensor) -> Tensors:
    """The parts of a quantized tensor; of two 4-bit integers in a byte the first is the low one."""
    if weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale = torch.tensor(weight.q_scale(), dtype=torch.float64)
        zero_point = torch.tensor(weight.q_zero_point())
    else:
        scale, zero_point = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
    return {
        "weight": weight.int_repr().contiguous(),
        "weight_scale": scale,
        "weight_zero_point": zero_point,
    }


def _quantized(like: Tensor, tensors: Tensors) -> Tensor:
    """The quantized tensor of these parts, of the shape, dtype and axis of ``like``."""
    scale, zero_point = tensors["weight_scale"], tensors["weight_zero_point"]
    if not scale.dim():
        made: Tensor = torch._make_per_tensor_quantized_tensor(
            tensors["weight"], scale.item(), int(zero_point)
        )
        return made
    made = torch._empty_per_channel_affine_quantized(
        like.shape,
        scales=scale,
        zero_points=zero_point,
        axis=like.q_per_channel_axis(),
        dtype=like.dtype,
    )
    # the way in for 4-bit integers too, which no function takes packed
    integers = torch.empty(0, dtype=tensors["weight"].dtype).set_(made.untyped_storage())
    integers.copy_(tensors["weight"].flatten())
    return made


def _with_bias(tensors: Tensors, bias: Tensor | None) -> Tensors:
    return tensors if bias is None else {**tensors, "bias": bias.detach()}


def _unpack_linear(packed: Any) -> Tensors:
    weight, bias = packed.__getstate__()[0]
    # a float16 weight comes out as float32
    parts = _integers(weight) if weight.is_quantized else {"weight": weight.half()}
    return _with_bias(parts, bias)


def _pack_linear(like: Any, tensors: Tensors) -> Any:
    weight, _ = like.__getstate__()[0]
    bias = tensors.get("bias")
    if not weight.is_quantized:
        return _ops.linear_prepack_fp16(tensors["weight"].float(), bias)
    return _ops.linear_prepack(_quantized(weight, tensors), bias)


def _unpack_convolution(packed: Any) -> Tensors:
    weight, bias = packed.unpack()
    return _with_bias(_integers(weight), bias)


def _pack_convolution(like: Any, tensors: Tensors) -> Any:
    weight, _ = like.unpack()
    return packed_convolution(like, _quantized(weight, tensors), tensors.get("bias"))


def packed_convolution(like: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """A convolution's weight packed for the engine of the moment, with the settings of ``like``."""
    dimensions = weight.dim() - 2

    def own(values: list[int]) -> list[int]:
        return values[-dimensions:]  # packed, one dimension is two

    settings = [own(like.stride()), own(like.padding())]
    word = "conv"
    if like.transpose():
        word = "conv_transpose"
        settings.append(own(like.output_padding()))
    prepack = getattr(_ops, f"{word}{dimensions}d_prepack")
    return prepack(weight, bias, *settings, own(like.dilation()), like.groups())


def _unpack_embedding(packed: Any) -> Tensors:
    return _integers(_ops.embedding_bag_unpack(packed))


def _pack_embedding(like: Any, tensors: Tensors) -> Any:
    return _ops.embedding_bag_prepack(_quantized(_ops.embedding_bag_unpack(like), tensors))


_CELL_WEIGHTS = ("ih", "hh")


def _cell_state(packed: Any) -> tuple[str, list[Any], bool]:
    """The name of the kind of a recurrent cell, its two packed weights, and reduce_range."""
    kind, _, _, numbers, weights = packed.__getstate__()[0]
    return kind, weights, bool(numbers and numbers[0])


def _unpack_cell(packed: Any) -> Tensors:
    kind, weights, _ = _cell_state(packed)
    found: Tensors = {}
    for role, weight in zip(_CELL_WEIGHTS, weights, strict=True):
        found |= {f"{role}.{part}": tensor for part, tensor in unpacked(weight).items()}
    if kind == "quantized_dynamic":  # these biases are used, and not those packed with the weights
        biases = packed.__getstate__()[0][1]
        found |= {f"{r}.bias": bias for r, bias in zip(_CELL_WEIGHTS, biases, strict=True)}
    return found


def _pack_cell(like: Any, tensors: Tensors) -> Any:
    kind, weights, reduce_range = _cell_state(like)
    parts = [
        {part: tensors[f"{role}.{part}"] for part in unpacked(weight)}
        for role, weight in zip(_CELL_WEIGHTS, weights, strict=True)
    ]
    packed = [repacked(weight, part) for weight, part in zip(weights, parts, strict=True)]
    if kind == "quantized_fp16":
        return _ops.make_quantized_cell_params_fp16(*packed)
    biases = [tensors[f"{role}.bias"] for role in _CELL_WEIGHTS]
    return _ops.make_quantized_cell_params_dynamic(*packed, *biases, reduce_range)


_CONVOLUTION = _Kind(_unpack_convolution, _pack_convolution)
_KINDS: Mapping[str, _Kind] = {
    "LinearPackedParamsBase": _Kind(_unpack_linear, _pack_linear),
    "Conv2dPackedParamsBase": _CONVOLUTION,
    "Conv3dPackedParamsBase": _CONVOLUTION,
    "EmbeddingPackedParamsBase": _Kind(_unpack_embedding, _pack_embedding),
    "CellParamsBase": _Kind(_unpack_cell, _pack_cell),
}


def packed_sites(converted: fx.GraphModule) -> Iterator[tuple[nn.Module, str, str]]:
    """Where the packed weights of sites are: a module, the name of its attribute, and the site.

    Those of a module are in it, those of a function beside the graph.
    """
    for node in converted.graph.nodes:
        site = site_of(node)
        if site is None or node.op not in CALLS:
            continue
        if node.op == "call_module":
            owner = converted.get_submodule(str(node.target))
            if isinstance(getattr(owner, "_packed_params", None), torch.ScriptObject):
                yield owner, "_packed_params", site
            continue
        for source in node.all_input_nodes:
            if isinstance(stored(source, converted), torch.ScriptObject):
                yield *stored_in(source, converted), site


def detours(
    converted: nn.Module, engines: Mapping[str, Engine], paths: Iterable[str]
) -> dict[tuple[nn.Module, str], Engine]:
    """The packed weights of sites that run on another engine than the model's.

    They are given by module and attribute; ``paths`` are those of the converted graphs, ``engines``
    has the sites.
    """
    found: dict[tuple[nn.Module, str], Engine] = {}
    for path in paths:
        graph_module: Any = converted.get_submodule(path)
        for owner, name, site in packed_sites(graph_module):
            if site in engines:
                found[owner, name] = engines[site]
    return found
