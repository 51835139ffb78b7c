"""torch's packed weights, unpacked into plain tensors and packed again.

Each kind of packed weight is a row of `_KINDS`. The packed form is private to an engine; its input
is an integer weight with scales and zero points, and a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Kinds = dict[int, tuple[torch.dtype, torch.qscheme]]
"""The dtype and scheme of weights, by the ``id`` of what they were packed into.

FBGEMM unpacks a weight as slowly as it packs it, which is too slow to ask only this.
"""

Tensors = dict[str, Tensor]
"""Plain tensors by role: ``weight``, ``weight_scale``, ``weight_zero_point``, ``bias``."""

_ops: Any = torch.ops.quantized


def unpacked(packed: Any) -> Tensors:
    """The plain tensors of a packed weight.

    Raises KeyError for an unknown kind of packed weight.
    """
    unpack = _KINDS[packed._type().name() if hasattr(packed, "_type") else ""]
    return {role: tensor.contiguous() for role, tensor in unpack(packed).items()}


def _integers(weight: Tensor) -> Tensors:
    """The parts of a quantized tensor; the first of two 4-bit integers is the low half."""
    if weight.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale = torch.tensor(weight.q_scale(), dtype=torch.float64)
        zero_point = torch.tensor(weight.q_zero_point())
    else:
        scale, zero_point = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
    return {
        "weight": _codes(weight),
        "weight_scale": scale,
        "weight_zero_point": zero_point,
    }


_CODES = {torch.qint8: torch.int8, torch.quint8: torch.uint8}


def _codes(weight: Tensor) -> Tensor:
    """The integers of a quantized tensor, which share its memory if they have a byte each."""
    if weight.dtype not in _CODES:
        return weight.int_repr()
    place = weight.storage_offset(), weight.size(), weight.stride()
    return torch.empty(0, dtype=_CODES[weight.dtype]).set_(weight.untyped_storage(), *place)


def one_each(codes: Tensor, shape: torch.Size) -> Tensor:
    """Stored integers of a weight of this shape, each as a number of its own."""
    if codes.numel() < shape.numel():
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten()[: shape.numel()]
    return codes.reshape(shape)


def _with_bias(tensors: Tensors, bias: Tensor | None) -> Tensors:
    return tensors if bias is None else {**tensors, "bias": bias.detach()}


def _unpack_linear(packed: Any) -> Tensors:
    weight, bias = packed.__getstate__()[0]
    # a float16 weight comes out as float32
    parts = _integers(weight) if weight.is_quantized else {"weight": weight.half()}
    return _with_bias(parts, bias)


def _unpack_convolution(packed: Any) -> Tensors:
    weight, bias = packed.unpack()
    return _with_bias(_integers(weight), bias)


def quantized_per_channel(
    weight: Tensor, scale: Tensor, zero_point: Tensor, axis: int, dtype: torch.dtype
) -> Tensor:
    """The result of ``torch.quantize_per_channel``, which takes three times as long.

    FBGEMM's formula: x times the reciprocal of the scale in float32, rounded with ties to even.
    """
    is_usual = (
        (dtype, weight.dtype, axis) == (torch.qint8, torch.float32, 0)
        and weight.is_contiguous()
        and not bool(zero_point.any())
        and bool((scale > 0).all())
        and "fbgemm" in torch.backends.quantized.supported_engines
    )
    if not is_usual:
        return torch.quantize_per_channel(weight, scale, zero_point, axis, dtype)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    steps = scale.float().reciprocal().view(-1, *[1] * (weight.dim() - 1))
    rows = rows_at_once(weight)
    for part, by, to in zip(weight.split(rows), steps.split(rows), codes.split(rows), strict=True):  # type: ignore[no-untyped-call]
        to.copy_((part * by).round_().clamp_(-128, 127))
    return torch._make_per_channel_quantized_tensor(codes, scale, zero_point, axis)


def rows_at_once(weight: Tensor) -> int:
    """How many rows of a weight to round at a time, so that they stay in the CPU's cache."""
    return max(1, _CACHED * len(weight) // max(1, weight.numel()))


_CACHED = 1 << 17


def _unpack_cell(packed: Any) -> Tensors:
    """Those of a recurrent cell's two weights."""
    kind, _, _, _, weights = packed.__getstate__()[0]
    found: Tensors = {}
    for role, weight in zip(_CELL_WEIGHTS, weights, strict=True):
        found |= {f"{role}.{part}": tensor for part, tensor in unpacked(weight).items()}
    if kind == "quantized_dynamic":  # these biases are used, not those packed with the weights
        biases = packed.__getstate__()[0][1]
        found |= {f"{r}.bias": bias for r, bias in zip(_CELL_WEIGHTS, biases, strict=True)}
    return found


_CELL_WEIGHTS = ("ih", "hh")
_KINDS: Mapping[str, Callable[[Any], Tensors]] = {
    "LinearPackedParamsBase": _unpack_linear,
    "Conv2dPackedParamsBase": _unpack_convolution,
    "Conv3dPackedParamsBase": _unpack_convolution,
    "EmbeddingPackedParamsBase": lambda packed: _integers(_ops.embedding_bag_unpack(packed)),
    "CellParamsBase": _unpack_cell,
}


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A packed weight to come: one of torch's operations that pack, and what it takes.

    The tensors in ``arguments`` have shapes and dtypes, and meaningless values.
    """

    operation: Any
    arguments: tuple[Any, ...]

    @property
    def _roles(self) -> tuple[str, ...]:
        """What the first arguments are."""
        is_cell = isinstance(self.arguments[0], Unpacked)
        biases = tuple(f"{role}.bias" for role in _CELL_WEIGHTS)
        return (*_CELL_WEIGHTS, *biases) if is_cell else ("weight", "bias")

    def tensors(self) -> Tensors:
        """The names, shapes and dtypes that `unpacked` would give, on the meta device."""
        found: Tensors = {}
        for role, value in zip(self._roles, self.arguments, strict=False):
            if isinstance(value, Unpacked):
                found |= {f"{role}.{part}": each for part, each in value.tensors().items()}
            elif isinstance(value, Tensor) and value.is_quantized:
                # torch packs one dimension as two
                found |= _integers(value.unsqueeze(2) if value.dim() == 3 else value)
            elif isinstance(value, Tensor):
                found[role] = (
                    value if "bias" in role else torch.empty(value.shape, dtype=torch.half)
                )
        return {role: tensor.to("meta") for role, tensor in found.items()}

    def packed(self, tensors: Tensors) -> torch.ScriptObject:
        """The packed weight, for the current engine, of tensors like those of `tensors`."""
        settings = self.arguments[len(self._roles) :]
        pairs = zip(self._roles, self.arguments, strict=False)
        filled = [_filled(role, value, tensors) for role, value in pairs]
        found: torch.ScriptObject = self.operation(*filled, *settings)
        return found


def _filled(role: str, value: Any, tensors: Tensors) -> Any:
    """An argument with the values of the tensors."""
    if isinstance(value, Unpacked):
        own = f"{role}."
        inside = {name.removeprefix(own): tensors[name] for name in tensors if own in name}
        return value.packed(inside)
    if not isinstance(value, Tensor):
        return value
    if not value.is_quantized:
        return tensors[role].float()
    scale, zero_point = tensors["weight_scale"], tensors["weight_zero_point"]
    made: Tensor
    if scale.dim():
        made = torch._empty_per_channel_affine_quantized(
            value.shape,
            scales=scale,
            zero_points=zero_point,
            axis=value.q_per_channel_axis(),
            dtype=value.dtype,
        )
    else:
        made = torch._empty_affine_quantized(
            value.shape, scale=scale.item(), zero_point=int(zero_point), dtype=value.dtype
        )
    # no copy; this also works for 4-bit integers, which no function takes packed
    return made.set_(tensors["weight"].untyped_storage(), 0, made.size(), made.stride())
