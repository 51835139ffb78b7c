"""One call of a model as a value."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from qrecipe.errors.findings import PlanError
from qrecipe.errors.short import ShortRepr
from qrecipe.model.nested import UncopyableError, map_tensors, tensors_in

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Inputs(ShortRepr):
    """One call of a model: positional and keyword arguments."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_batch(batch: Any) -> Inputs:
        """From a tuple or list of positional inputs, a mapping of keyword inputs, or one input."""
        if isinstance(batch, Mapping):
            return Inputs(kwargs=dict(batch.items()))
        # a packed sequence is a tuple, but a single input
        if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
            return Inputs(args=tuple(batch))
        return Inputs(args=(batch,))

    @property
    def batch(self) -> Any:
        """The batch from which `from_batch` makes these inputs."""
        if self.kwargs:
            return dict(self.kwargs)
        is_one = len(self.args) == 1 and not isinstance(self.args[0], (Mapping, tuple, list))
        return self.args[0] if is_one else self.args

    def call(self, model: nn.Module) -> Any:
        if isinstance(model, fx.GraphModule):
            # a graph module's __call__ prints a traceback of its code before it raises
            return nn.Module.__call__(model, *self.args, **dict(self.kwargs))
        return model(*self.args, **dict(self.kwargs))

    @property
    def batch_size(self) -> int | None:
        """The size of the first dimension, if all tensors have the same."""
        return batch_size((self.args, dict(self.kwargs)))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """With other tensors. Raises ``UncopyableError`` like `nested.map_tensors`."""
        return Inputs(*map_tensors(change, (self.args, dict(self.kwargs))))

    def taken(self, samples: Tensor) -> Inputs:
        """The samples of these numbers. Raises ``UncopyableError`` like `nested.map_tensors`."""
        return self.mapped(lambda x: x[samples])

    def first_samples(self, count: int) -> Inputs:
        """The first samples, if all tensors have the same larger batch size; else ``self``."""
        size = self.batch_size
        if size is None or size <= count:
            return self
        try:
            few = self.mapped(lambda x: x[:count])
        except UncopyableError:
            return self
        # a container that computes its tensors on access has returned the whole batch again
        return few if few.batch_size == count else self

    def of_another_size(self) -> Inputs | None:
        """The first sample of several, or the only one twice; None if nothing is a batch."""
        size = self.batch_size
        if not size:
            return None
        if size > 1:
            first = self.first_samples(1)
            return None if first is self else first
        try:
            return self.taken(torch.zeros(2, dtype=torch.long))
        except UncopyableError:
            return None

    def cloned(self) -> Inputs:
        """A copy with cloned tensors, for a forward that may write to them.

        Raises ``PlanError`` (QR307) if a container of tensors cannot be copied.
        """
        try:
            return self.mapped(Tensor.clone)
        except UncopyableError as error:
            raise PlanError.of(
                "QR307",
                f"among the example inputs {error}",
                hint="pass tensors directly, or in a dict, list, tuple or dataclass",
            ) from error


FEW_SAMPLES = 2
"""More than one, so that code for the other samples (``y[1:]``) has an effect."""


def on_few(inputs: Inputs, run: Callable[[Inputs], _Result]) -> _Result:
    """The result of ``run`` for a few samples, or for all of them if it fails with a few."""
    try:
        return run(inputs.first_samples(FEW_SAMPLES))
    except Exception:
        return run(inputs)


EMPTY = "it is empty, so nothing can be observed"


def is_empty(batch: Any) -> bool:
    """Whether a batch has tensors, and all of them are empty."""
    tensors = list(tensors_in(batch))
    return bool(tensors) and not any(tensor.numel() for tensor in tensors)


def batch_size(value: Any) -> int | None:
    """The size of the first dimension, if it is the same for all tensors in ``value``."""
    tensors = list(tensors_in(value))
    if not all(tensor.layout == torch.strided and tensor.dim() for tensor in tensors):
        return None
    sizes = {tensor.shape[0] for tensor in tensors}
    return sizes.pop() if len(sizes) == 1 else None


def head(value: Any, count: int) -> Any:
    """``value`` with the first samples of each tensor in it."""
    return map_tensors(lambda tensor: tensor[:count], value)


def first_of(inputs: Inputs, output: Any, count: int) -> tuple[Inputs, Any] | None:
    """The first samples of a call with their part of its output; None if it cannot be cut."""
    few = inputs.first_samples(count)
    if few is inputs or batch_size(output) != inputs.batch_size:
        return None
    try:
        return few, head(output, count)
    except UncopyableError:
        return None


def bind(graph_module: fx.GraphModule, model: nn.Module, inputs: Inputs) -> tuple[Any, ...]:
    """The inputs in the order of the graph's placeholders.

    Raises ``PlanError`` (QR307) if they do not fit the signature of the model's ``forward``.
    """
    given = arguments(model, inputs)
    return tuple(
        given[str(node.target)] for node in graph_module.graph.nodes if node.op == "placeholder"
    )


VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
"""The kinds of ``*args`` and ``**kwargs``."""


def variadic(model: nn.Module, inputs: Inputs) -> str | None:
    """``*args`` or ``**kwargs`` of ``forward``, by its name, if the inputs fill it."""
    given = arguments(model, inputs)
    for parameter in signature_of(model).parameters.values():
        if parameter.kind in VARIADIC and given[parameter.name]:
            return str(parameter).partition(":")[0]
    return None


def constants(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The arguments of ``forward`` that are not tensors, including defaults: None, flags, numbers.

    Raises ``PlanError`` (QR307) like `bind`.
    """
    return {
        name: value
        for name, value in arguments(model, inputs).items()
        if value is None or isinstance(value, (bool, int, float, str))
    }


def arguments(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The argument of each parameter of ``forward``, including defaults.

    Raises ``PlanError`` (QR307) like `bind`.
    """
    given = bound(model, inputs)
    given.apply_defaults()
    return given.arguments


def bound(model: nn.Module, inputs: Inputs) -> inspect.BoundArguments:
    """The inputs by the parameters of ``forward``, without defaults.

    Raises ``PlanError`` (QR307) like `bind`.
    """
    signature = signature_of(model)
    try:
        return signature.bind(*inputs.args, **dict(inputs.kwargs))
    except TypeError as error:
        raise PlanError.of(
            "QR307",
            f"the example inputs do not fit forward{signature}: {error}",
            hint="pass a tuple for positional inputs, a dict for keyword inputs",
        ) from error


def given_names(model: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """The parameters of ``forward`` that the inputs fill, but not with None.

    Raises ``PlanError`` (QR307) like `bind`.
    """
    filled = bound(model, inputs).arguments.items()
    return tuple(name for name, value in filled if value is not None)


def signature_of(model: nn.Module) -> inspect.Signature:
    try:
        return inspect.signature(model.forward)
    except ValueError:  # of a callable that is not written in Python
        kinds = zip(("args", "kwargs"), VARIADIC, strict=True)
        return inspect.Signature([inspect.Parameter(name, kind) for name, kind in kinds])
