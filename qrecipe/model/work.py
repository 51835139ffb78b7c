"""Counts the multiplications of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qrecipe.model.call import Inputs, bind
from qrecipe.model.copies import runnable_copy
from qrecipe.model.dry_run import try_inputs
from qrecipe.model.graph_sites import Inventory, Part
from qrecipe.model.interpreter import Interpreter
from qrecipe.model.nested import tensors_in
from qrecipe.process.state import alone, random_numbers_kept
from qrecipe.rules.structure import enclosing

_CONVOLUTIONS = ("aten.convolution", "aten._convolution")
_PRODUCTS = tuple(
    f"aten.{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")
)
_LINEAR = "aten.linear"
"""A single operation for nested tensors only; otherwise one of the products."""
_BILINEAR = "aten._trilinear"
_LSTM = "aten.mkldnn_rnn_layer"


@dataclass(frozen=True, slots=True)
class Work:
    """Multiplications with weights in one run, and the number of parameters.

    ``convolutions`` and ``products`` (matrix products, including recurrent layers) count torch
    operations of both functions and modules. Weights are tensors that do not depend on the inputs;
    products of two activations, as in attention, are not counted. ``places`` has the counts by the
    path of the innermost module whose forward made them ("" for the model's own).
    """

    convolutions: int
    products: int
    places: Mapping[str, int]
    parameters: int

    @property
    def total(self) -> int:
        return self.convolutions + self.products

    @property
    def convolution_share(self) -> float:
        """The share of convolutions, 0 to 1; 0 if nothing is multiplied."""
        return self.convolutions / max(1, self.total)


def work_of(model: nn.Module, inputs: Inputs) -> Work:
    """Count the multiplications of one run of a copy of the model.

    Raises ``PlanError`` like `dry_run.try_inputs`.
    """

    def run(counter: _Counter, given: Inputs) -> None:
        probe = runnable_copy(model)
        for path, module in probe.named_modules():
            if path:
                module.register_forward_pre_hook(partial(counter.enter, path))
                module.register_forward_hook(counter.leave)
        try_inputs(probe, given, model)

    counter = _counted(run, inputs)
    return Work(
        counter.convolutions,
        counter.counts.total() - counter.convolutions,
        dict(counter.counts),
        sum(parameter.numel() for parameter in model.parameters()),
    )


def work_of_sites(
    model: nn.Module, inventory: Inventory, places: Mapping[str, int]
) -> dict[str, int]:
    """The multiplications with weights by site; sites without any are left out.

    ``places`` are those of `work_of`, used if the model was not traced.
    """
    counts: Counter[str] = Counter()
    for part in inventory.parts:
        counts += _work_of_part(part, model.get_submodule(part.path))
    if inventory.untraced is not None:
        for path, count in places.items():
            counts[nearest(path, inventory.matches) or ""] += count
        del counts[""]
    return dict(counts)


def nearest(path: str, names: Container[str]) -> str | None:
    """The innermost of the named modules that is or contains the module at ``path``."""
    return next((outer for outer in enclosing(path) if outer in names), None)


def _work_of_part(part: Part, module: nn.Module) -> Counter[str]:
    def run(counter: _Counter, given: Inputs) -> None:
        graph_module = runnable_copy(part.graph_module)
        with torch.no_grad():
            _BySite(graph_module, counter).run(*bind(graph_module, module, given))

    counter = _counted(run, part.inputs)
    del counter.counts[""]
    return counter.counts


def _counted(run: Callable[[_Counter, Inputs], None], inputs: Inputs) -> _Counter:
    """What is multiplied in a run.

    Nested tensors need torch's fast path, in which nothing is counted.
    """

    def counting() -> _Counter:
        given = inputs.cloned()
        counter = _Counter(given)
        with counter:
            run(counter, given)
        return counter

    with random_numbers_kept():
        try:
            with _without_fast_path():
                return counting()
        except Exception:
            return counting()


class _BySite(Interpreter):
    """Tells a counter which site is being computed."""

    def __init__(self, graph_module: fx.GraphModule, counter: _Counter) -> None:
        super().__init__(graph_module)
        self._counter = counter

    def run_node(self, n: fx.Node) -> Any:
        self._counter.enter(n.meta.get("site", ""))
        result = super().run_node(n)
        self._counter.leave()
        return result


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the multiplications with weights that run inside, by place.

    Tensors are identified by their memory. Those computed from the inputs depend on them; all
    others are weights, including reshaped copies of parameters and normalised weights.
    """

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.convolutions = 0
        self._places = [""]
        self._dependent: set[int] = set()
        self._note((inputs.args, inputs.kwargs), depends=True)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `dry_run`: torch would import dynamo to skip it

    def enter(self, place: str, *_: Any) -> None:
        self._places.append(place)

    def leave(self, *_: Any) -> None:
        self._places.pop()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # it keeps operations whole: linear, not its parts
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        self._count(func, {**dict(zip(_names(func), args, strict=False)), **kwargs}, result)
        self._note(result, any(map(self._depends, tensors_in((args, kwargs)))))
        return result

    def _count(self, func: Any, given: Mapping[str, Any], result: Any) -> None:
        operation = str(func.overloadpacket)
        found = _multiplied(operation, [given.get(name) for name in _names(func)], result)
        if found is None or all(map(self._depends, found[:2])):
            return
        self.counts[self._places[-1]] += found[2]
        if operation in _CONVOLUTIONS:
            self.convolutions += found[2]

    def _depends(self, tensor: Tensor) -> bool:
        return _memory(tensor) in self._dependent

    def _note(self, value: Any, depends: bool) -> None:
        """Record whether a result depends on the inputs; memory is reused."""
        memory = set(map(_memory, tensors_in(value)))
        change = self._dependent.update if depends else self._dependent.difference_update
        change(memory)


def _names(func: Any) -> list[str]:
    """The names of an operation's positional arguments."""
    return [argument.name for argument in func._schema.arguments if not argument.kwarg_only]


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # sparse, or a wrapper subclass
        return id(tensor)


def _multiplied(
    operation: str, args: Sequence[Any], result: Any
) -> tuple[Tensor, Tensor, int] | None:
    """The two operands and the number of multiplications; None for other operations."""
    if operation in _CONVOLUTIONS:
        x, weight, transposed = args[0], args[1], args[6]
        return x, weight, (x if transposed else result).numel() * prod(weight.shape[1:])
    if operation in _PRODUCTS:
        a, b = [arg for arg in args if isinstance(arg, Tensor)][-2:]
        return a, b, result.numel() * a.shape[-1]
    if operation == _LINEAR:
        return args[0], args[1], result.numel() * args[1].shape[-1]
    if operation == _BILINEAR:
        return args[0], args[1], result.numel() * prod(args[1].shape[-2:])
    if operation == _LSTM:  # x is (steps, samples, features), each weight is used at every step
        x, of_input, of_hidden = args[:3]
        return x, of_input, x.shape[0] * x.shape[1] * (of_input.numel() + of_hidden.numel())
    return None


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Disable the fused fast path of torch's attention and encoder layers in eval mode."""
    with alone():
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(before)
