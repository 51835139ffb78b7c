"""Preparing and converting: torch's own functions, on copies, under the backend's engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from qrecipe._torch_ao import quiet
from qrecipe._torch_fx import (
    assert_and_get_unique_device,
    convert,
    lower_to_native_backend,
    prepare,
)
from qrecipe.audit.modules import forget_qconfigs, take_any_layout
from qrecipe.errors.findings import ExecutionError, PlanError
from qrecipe.execution.engine import engine
from qrecipe.execution.fake_quants import freeze_batch_norm
from qrecipe.execution.fx.emission import Emission, erase_marks
from qrecipe.execution.fx.flat_code import look_modules_up_once
from qrecipe.execution.fx.lowering import (
    average_in_one_layout,
    join_in_one_layout,
    lower_ours,
    read_shapes_of_integers,
)
from qrecipe.execution.fx.observing import (
    OBSERVED,
    observe_before_drops,
    observe_clamped,
    observe_moved_again,
    observe_moved_once,
    remove_drops,
    share_connected_observers,
)
from qrecipe.execution.fx.patches import (
    computed_weights_left_alone,
    delete_unused_submodules,
    numbers_unobserved,
    qconfigs_asked_once,
    unused_looked_up,
    without_repetition,
)
from qrecipe.execution.own_engines import keep_engines
from qrecipe.execution.packing import Kinds, quantized_per_channel
from qrecipe.model.addresses import site_of
from qrecipe.model.copies import own_tensors, structural_copy
from qrecipe.model.graph_names import keep_state_names
from qrecipe.model.nodes import called_modules
from qrecipe.model.results import expect_chunks
from qrecipe.model.rewrites.batch_norms import FROZEN, SYNCHRONISED, synchronise, unsynchronise
from qrecipe.planning.backend import own_backend_config
from qrecipe.planning.plan import Engine, Plan
from qrecipe.process.memory import failing_as
from qrecipe.process.state import random_numbers_kept

_REPORT = "leave the named operation float, and report the model"


def prepared_copy(graph_module: fx.GraphModule, emission: Emission, plan: Plan) -> fx.GraphModule:
    """A copy of the graph with observers or fake-quants inserted; it shares the float tensors.

    Raises ``PlanError`` (QR306) if torch fails.
    """
    copied = structural_copy(graph_module)
    weights = dict(copied.named_parameters(remove_duplicate=False))
    backend_config = own_backend_config(plan.backend)
    with (
        failing_as(PlanError, "QR306", "torch cannot prepare the model", _REPORT),
        quiet(),
        _nothing_kept(),
        random_numbers_kept(),
        without_repetition(copied, backend_config),
        numbers_unobserved(),
    ):
        prepared = prepare(
            copied,
            emission.qconfig_mapping,
            plan.phase == "qat",
            dict(emission.scopes),
            (),
            backend_config=backend_config,
        )
    _tie_again(prepared, weights)
    observe_before_drops(prepared)
    for node in prepared.graph.nodes:
        if FROZEN in node.meta:
            freeze_batch_norm(prepared.get_submodule(str(node.target)))
        elif SYNCHRONISED in node.meta:
            synchronise(node, prepared)
    share_connected_observers(prepared)
    observe_moved_once(prepared)
    observe_clamped(prepared, emission.clamps)
    keep_state_names(prepared)
    return prepared


def _tie_again(prepared: fx.GraphModule, weights: Mapping[str, nn.Parameter]) -> None:
    """Tie parameters again that torch wrapped separately: a shared weight would become two."""
    for name, parameter in list(prepared.named_parameters(remove_duplicate=False)):
        former = weights.get(name)
        if former is not None and former is not parameter and former.shape == parameter.shape:
            path, _, own = name.rpartition(".")
            setattr(prepared.get_submodule(path), own, former)


def as_torch_prepared(prepared: fx.GraphModule) -> fx.GraphModule:
    """A copy as torch's conversion knows it, and may change it."""
    source = structural_copy(prepared)
    for node in source.graph.nodes:
        if SYNCHRONISED in node.meta:
            unsynchronise(node)
    observe_moved_again(source)
    remove_drops(source)
    return source


def reference(prepared: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """torch's reference conversion: float kernels between dequantize and quantize.

    The identities that `altered_modules.keep_float` inserted are still in it. Raises
    ``ExecutionError`` (QR405) if torch fails.
    """
    with (
        _failing_to_convert(),
        quiet(),
        _nothing_kept(),
        _own_weights_only(),
        random_numbers_kept(),
        computed_weights_left_alone(),
        qconfigs_asked_once(),
        unused_looked_up(),
    ):
        converted = convert(
            as_torch_prepared(prepared),
            True,
            _remove_qconfig_flag=False,  # lowering needs it
            backend_config=own_backend_config(plan.backend),
        )
    keep_state_names(converted)
    return converted


def lowered(
    reference: fx.GraphModule,
    prepared: fx.GraphModule,
    plan: Plan,
    engines: Mapping[str, Engine],
    kinds: Kinds,
) -> fx.GraphModule:
    """Lower the reference conversion to the backend's kernels, in place.

    This is the second half of torch's ``convert``, so that one conversion gives both models. The
    result shares no tensor with ``prepared``. ``engines`` has the sites that run on another engine;
    ``kinds`` gets what is packed.
    Raises ``ExecutionError`` (QR405) if torch fails and ``UnsupportedError`` (QR309) as `engine`.
    """
    packing = _own_weights_only(kinds)
    for module, own in _on_other_engines(reference, engines):
        packing.pack_for(own, module)
    observed = prepared.meta[OBSERVED]
    own_tensors(reference, lambda x: x.dim() == 1)  # packing keeps references to biases
    with (
        engine(plan.backend),
        _failing_to_convert(),
        quiet(),
        _nothing_kept(),
        packing,
        random_numbers_kept(),
    ):
        lower_ours(reference, observed.node_name_to_qconfig)
        converted = lower_to_native_backend(
            reference,
            observed.node_name_to_qconfig,
            observed.node_name_to_scope,
        )
    keep_engines(converted, engines, plan.backend)
    take_any_layout(converted)
    forget_qconfigs(converted)
    delete_unused_submodules(converted)
    erase_marks(converted)
    expect_chunks(converted)
    read_shapes_of_integers(converted)
    join_in_one_layout(converted)
    average_in_one_layout(converted)
    look_modules_up_once(converted)
    keep_state_names(converted)
    return converted


@contextmanager
def _nothing_kept() -> Iterator[None]:
    """Clear torch's cache of devices, which keeps every prepared or converted model alive."""
    try:
        yield
    finally:
        assert_and_get_unique_device.cache_clear()


def _failing_to_convert() -> AbstractContextManager[None]:
    what = "torch could not convert the prepared model"
    return failing_as(ExecutionError, "QR405", what, _REPORT)


class _own_weights_only(TorchFunctionMode):  # noqa: N801 - reads as what it does in a with statement
    """Neither draws nor packs the first weights of modules, which get their own right away.

    It costs as much as quantizing and packing those, which is itself done in less time than torch
    takes.
    """

    def __init__(self, kinds: Kinds | None = None) -> None:
        super().__init__()
        self._kinds = {} if kinds is None else kinds
        self._empty: torch.Tensor | None = None
        self._elsewhere: tuple[torch.Tensor, Engine] | None = None

    def pack_for(self, own: Engine, module: nn.Module) -> None:
        """Pack the weight of a reference module for another engine than the current one."""
        quantized: Any = module.get_quantized_weight

        def quantized_for_own() -> torch.Tensor:
            weight: torch.Tensor = quantized()
            self._elsewhere = weight, own
            return weight

        module.get_quantized_weight = quantized_for_own  # type: ignore[assignment]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (nn.init.kaiming_uniform_, nn.init.uniform_):
            return args[0] if args else kwargs["tensor"]
        if func in _PREPACK and args[0] is self._empty:
            return None
        if func is torch.quantize_per_channel:
            func = quantized_per_channel
        with self._engine_for(func, args):
            result = func(*args, **(kwargs or {}))
        if func is torch._empty_affine_quantized:
            self._empty = result
        elif func in _PREPACK and args[0].is_quantized:
            self._kinds[id(result)] = args[0].dtype, args[0].qscheme()
        return result

    def _engine_for(self, func: Any, args: tuple[Any, ...]) -> AbstractContextManager[None]:
        if func not in _PREPACK or self._elsewhere is None or args[0] is not self._elsewhere[0]:
            return nullcontext()
        return engine(self._elsewhere[1])


_ops: Any = torch.ops.quantized
_PREPACK = frozenset(
    (
        _ops.linear_prepack,
        *(getattr(_ops, f"conv{dimensions}d_prepack") for dimensions in (1, 2, 3)),
        *(getattr(_ops, f"conv_transpose{dimensions}d_prepack") for dimensions in (1, 2, 3)),
    )
)


def _on_other_engines(
    reference: fx.GraphModule, engines: Mapping[str, Engine]
) -> Iterator[tuple[nn.Module, Engine]]:
    """The reference modules of sites whose weights are packed for an engine of their own."""
    for node, layer in called_modules(reference.graph):
        own = engines.get(site_of(node) or "")
        if own is not None:
            found = (each for each in layer.modules() if hasattr(each, "get_quantized_weight"))
            yield from ((each, own) for each in found)
