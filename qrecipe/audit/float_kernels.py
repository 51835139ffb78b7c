"""What quantized kernels compute, in float: with the weights that they really have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call

from qrecipe._torch_fx import DynamicLinear, QuantizedEmbedding
from qrecipe.model.call import Inputs
from qrecipe.planning.saturation import ADDS_IN_16_BITS
from qrecipe.recipe.schema import Backend

_LEAST_SCALE = 1e-12
"""Of the dynamic kernels."""


class UnknownKernelError(Exception):
    """A kernel with no float counterpart here; says which."""


def float_result(
    node: fx.Node, module: nn.Module | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """What a node would return for float inputs if only its weights were rounded.

    ``module`` is the one that the node calls. Only for `is_kernel`. Raises `UnknownKernelError`.
    """
    if module is not None:
        return _module_result(module, args, kwargs)
    name = str(node.target).removeprefix("quantized.")
    if name not in _FUNCTIONS:
        raise UnknownKernelError(str(node.target))
    return _FUNCTIONS[name](*args, **kwargs)


def is_kernel(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node of a converted graph takes quantized tensors only."""
    if module is not None:
        path = type(module).__module__
        is_torchs = path.startswith("torch.ao.nn.") and ".quantized.modules" in path
        return is_torchs and "dynamic" not in path and "embedding" not in path
    return str(node.target).startswith("quantized.") and "_dynamic" not in str(node.target)


def qparams_of_result(node: fx.Node) -> tuple[Any, ...]:
    """Where a call of a kernel takes the scale and the zero point of what it returns."""
    names = ("output_scale", "output_zero_point")
    return tuple(map(node.kwargs.get, names)) if names[0] in node.kwargs else node.args[-2:]


def _module_result(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    name = type(module).__name__
    packed = getattr(module, "_packed_params", None)
    packed = getattr(packed, "_packed_params", packed)  # of a linear layer
    if isinstance(packed, torch.ScriptObject):
        input, *added = *args, *kwargs.values()
        if getattr(module, "padding_mode", "zeros") != "zeros":  # then none is packed
            padding = module.padding[2 - input.dim() :]
            both_ends = [size for size in reversed(padding) for _ in range(2)]
            input = F.pad(input, both_ends, mode=module.padding_mode)
        result = sum(added, _weighted(input, packed))
    else:
        result = _plain_forward(module)(module, *args, **kwargs)
    return torch.relu(result) if "ReLU" in name and not name.endswith("LeakyReLU") else result


def _plain_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the float class that a quantized module was made from."""
    bases: Sequence[Any] = type(module).__mro__[1:]
    for base in bases:
        if base.__module__.startswith("torch.nn.modules.") and base is not nn.Module:
            forward: Callable[..., Any] = base.forward
            return forward
    raise UnknownKernelError(type(module).__name__)


_PLAIN: Mapping[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: Mapping[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def _weighted(input: Tensor, packed: Any) -> Tensor:
    """A convolution or linear layer with its packed weights."""
    weight, bias = packed.unpack()
    weight = weight.dequantize()
    if not hasattr(packed, "stride"):
        return F.linear(input, weight, bias)
    dimensions = input.dim() - 2
    if weight.dim() - 2 > dimensions:  # torch packs one dimension as two
        weight = weight.squeeze(2)

    def own(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(values)[-dimensions:]

    before, after = (own(packed.stride()), own(packed.padding())), own(packed.dilation())
    if packed.transpose():
        padded = own(packed.output_padding())
        function = _TRANSPOSED[dimensions]
        return function(input, weight, bias, *before, padded, packed.groups(), after)
    return _PLAIN[dimensions](input, weight, bias, *before, after, packed.groups())


_FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "add": lambda a, b, *_: a + b,
    "add_relu": lambda a, b, *_: torch.relu(a + b),
    "mul": lambda a, b, *_: a * b,
    "mul_relu": lambda a, b, *_: torch.relu(a * b),
    "matmul": lambda a, b, *_: torch.matmul(a, b),
    "hardswish": lambda input, *_, **__: F.hardswish(input),
    "leaky_relu": lambda input, negative_slope=0.01, *_, **__: F.leaky_relu(input, negative_slope),
    "elu": lambda input, *_, alpha=1.0, **__: F.elu(input, alpha),
    "layer_norm": lambda input, shape, weight, bias, eps, **_: F.layer_norm(
        input, shape, weight, bias, eps
    ),
    "instance_norm": lambda input, weight, bias, eps, **_: F.instance_norm(
        input, weight=weight, bias=bias, eps=eps
    ),
}
"""The ``torch.ops.quantized`` operations that lowering emits; scale and zero point come last."""


def expected_output(
    kernel: nn.Module, compute: Callable[[Tensor], Any], inputs: Inputs, backend: Backend
) -> Tensor | None:
    """What a module should return: ``compute`` on its input, which is rounded if it is dynamic.

    ``compute`` is float arithmetic with the rounded weight. None for recurrent modules, which
    round again at every step.
    """
    operands = [*inputs.args, *inputs.kwargs.values()]
    if len(operands) != 1 or not isinstance(operands[0], Tensor) or not operands[0].numel():
        return None
    x = operands[0]
    if isinstance(kernel, DynamicLinear) and _weight(kernel).is_quantized:
        x = _rounded(x, bits_of_dynamic_input(backend))
    elif not isinstance(kernel, (DynamicLinear, QuantizedEmbedding)):
        return None
    expected: Tensor = compute(x)
    return expected


def bits_of_dynamic_input(backend: Backend) -> int:
    """The bits of an input whose range is found in each call: as many as cannot saturate."""
    return 7 if backend in ADDS_IN_16_BITS else 8


def with_weight_of(kernel: nn.Module, own: nn.Module, x: Tensor) -> Any:
    """What a float module computes with the kernel's rounded weight."""
    weight: Any = own.weight
    return functional_call(own, {"weight": _on_grid_of(_weight(kernel), weight.detach())}, (x,))


def _weight(kernel: Any) -> Tensor:
    weight: Tensor = kernel.weight()
    return weight


def _on_grid_of(stored: Tensor, weight: Tensor) -> Tensor:
    if not stored.is_quantized:
        return weight.half().float()
    if str(stored.qscheme()).startswith("torch.per_channel"):
        quantized = torch.quantize_per_channel(
            weight,
            stored.q_per_channel_scales(),
            stored.q_per_channel_zero_points(),
            stored.q_per_channel_axis(),
            stored.dtype,
        )
    else:
        quantized = torch.quantize_per_tensor(
            weight, stored.q_scale(), stored.q_zero_point(), stored.dtype
        )
    return quantized.dequantize()


def _rounded(x: Tensor, bits: int) -> Tensor:
    """Round as dynamic kernels do: affine, over the range of the tensor itself."""
    most = 2**bits - 1
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = max((high - low) / most, _LEAST_SCALE)
    zero_point = min(round(-low / scale), most)
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, most)
