"""Runs a copy of the caller's model once, without side effects on the caller's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qrecipe._torch_versions import rewrites_statistics
from qrecipe.errors.findings import PlanError
from qrecipe.errors.text import first_line
from qrecipe.model.call import Inputs, arguments
from qrecipe.model.copies import runnable_copy
from qrecipe.model.nested import parts_of, tensors_in
from qrecipe.model.unfit import unfit
from qrecipe.process.state import random_numbers_kept

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"_buffers", "_parameters"}
_DEEPEST = 4


def try_out(probe: nn.Module, inputs: Inputs, owner: nn.Module) -> Any:
    """The output of ``probe``, a copy of ``owner`` that shares its parameters.

    Raises ``PlanError`` (QR306) before its forward writes to a parameter of ``owner``; and anything
    that the forward itself raises.
    """
    with torch.no_grad(), _ReadOnly(owner):
        return inputs.call(probe)


def try_inputs(probe: nn.Module, inputs: Inputs, owner: nn.Module) -> Any:
    """Like `try_out`, but raises ``PlanError`` (QR307) if the model does not accept the inputs."""
    try:
        return try_out(probe, inputs, owner)
    except PlanError:
        raise
    except Exception as error:
        raise unusable(error) from error


@contextmanager
def drawing_nothing() -> Iterator[None]:
    """Raises ``PlanError`` (QR306) if a forward that runs inside draws random numbers.

    The caller's random number generators are not affected.
    """
    with random_numbers_kept():
        before = torch.get_rng_state()
        yield
        drew = not torch.equal(before, torch.get_rng_state())
    if drew:
        raise unfit(
            "the model's forward draws random numbers in eval mode",
            "measurements would not be comparable: draw them outside of forward",
        )


def first_calls(model: nn.Module, paths: Iterable[str], inputs: Inputs) -> dict[str, Inputs]:
    """The inputs of the first call of each submodule in a run; those not called are left out.

    Raises ``PlanError`` like `try_inputs`.
    """
    probe = runnable_copy(model)
    taken: dict[str, Inputs] = {}

    def take(path: str, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if path not in taken:  # cloned because later code may write to them
            taken[path] = Inputs(args, dict(kwargs)).cloned()

    for path in paths:  # with hooks: calling forward directly does not call a graph module
        module = probe.get_submodule(path)
        module.register_forward_pre_hook(partial(take, path), with_kwargs=True)
    with random_numbers_kept():
        try_inputs(probe, inputs.cloned(), model)
    return taken


def around_calls(probe: nn.Module, paths: Iterable[str], call: Callable[..., Any]) -> None:
    """Let ``call(path, forward, *args, **kwargs)`` answer the calls of submodules, in place.

    Without hooks: torch's encoder layers take another path through the model if there are any.
    """
    for path in paths:
        module = probe.get_submodule(path)
        vars(module)["forward"] = partial(call, path, module.forward)


CANNOT_TAKE = "the model does not accept the example inputs: "


def unusable(error: Exception) -> PlanError:
    """The error (QR307) for inputs on which the model's forward raised ``error``."""
    return PlanError.of(
        "QR307",
        f"{CANNOT_TAKE}{first_line(error)}",
        hint="pass the tensors that forward takes, without labels, with a batch dimension",
    )


class _ReadOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rejects every operation that would write to a parameter of a model."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {
            parameter.untyped_storage().data_ptr(): name
            for name, parameter in owner.named_parameters()
            if parameter.layout == torch.strided and parameter.numel()
        }

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import dynamo to skip it, which takes a second

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for index, argument in enumerate(func._schema.arguments):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                written = args[index] if index < len(args) else kwargs.get(argument.name)
                for tensor in tensors_in(written):
                    self._check(tensor, func)
        return func(*args, **kwargs)

    def _check(self, tensor: Tensor, func: Any) -> None:
        if tensor.layout != torch.strided:
            return
        name = self.names.get(tensor.untyped_storage().data_ptr())
        if name is not None:
            raise unfit(
                f"forward writes to the parameter {name} ({func.overloadpacket.__name__})",
                "change the weights once, outside of forward",
            )


State = Mapping[str, tuple[Any, int | None]]
"""The state of a model by dotted name: each value, and its version if it is a tensor."""


def state_of(model: nn.Module) -> State:
    """All buffers, parameters and attributes of a model."""
    found: dict[str, tuple[Any, int | None]] = {}
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key == "_buffers":
                found |= {} if rewrites_statistics(module) else dict(_leaves(path, value, 0))
            elif key == "_parameters":  # `try_out` checks writes to parameters
                found |= {f"{path}.{name}": (tensor, None) for name, tensor in value.items()}
            elif key not in _OF_EVERY_MODULE and key not in _computed_by_hooks(module):
                found |= dict(_leaves(f"{path}.{key}" if path else key, value, 0))
    return found


def _computed_by_hooks(module: nn.Module) -> set[Any]:
    """The weights that torch's own hooks (pruning, weight norms) compute at each call."""
    hooks = module._forward_pre_hooks.values()
    return {getattr(hook, "_tensor_name", getattr(hook, "name", None)) for hook in hooks}


def _leaves(name: str, value: Any, depth: int) -> Iterator[tuple[str, tuple[Any, int | None]]]:
    parts = parts_of(value) if depth < _DEEPEST else None
    if parts is None:
        yield name, (value, version(value))
        return
    for key, part in parts.items():
        yield from _leaves(f"{name}.{key}" if name else str(key), part, depth + 1)


def changed(before: State, after: State) -> Iterator[str]:
    """The names of what was written to."""
    for name in dict.fromkeys((*after, *before)):
        if name not in before or name not in after or not _same(before[name], after[name]):
            yield name


def first_change(before: State, after: State) -> str | None:
    """The name of something that was written to, or None."""
    return next(changed(before, after), None)


def _same(before: tuple[Any, int | None], after: tuple[Any, int | None]) -> bool:
    (old, writes), (new, writes_now) = before, after
    is_equal = isinstance(old, (bool, int, float, str)) and type(old) is type(new) and old == new
    return writes == writes_now and (old is new or is_equal)


Versions = Mapping[str, list[int | None]]
"""The versions of the tensors in each argument of forward; each in-place write increments one."""


def changed_argument(model: nn.Module, inputs: Inputs, versions: Versions) -> str | None:
    """The argument of forward that was written to since `versions_of` looked at the inputs."""
    now = versions_of(model, inputs)
    return next((name for name, found in now.items() if found != versions[name]), None)


def versions_of(model: nn.Module, inputs: Inputs) -> Versions:
    given = arguments(model, inputs).items()
    return {name: list(map(version, tensors_in(value))) for name, value in given}


def version(value: Any) -> int | None:
    """How often a tensor was written to; None if it does not count that."""
    is_counted = isinstance(value, Tensor) and not value.is_inference()
    return value._version if is_counted else None
