"""The fake-quants of a prepared model: which observe, which learn, and when they are frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn

from qrecipe._torch_ao import FakeQuantizeBase, StandIn, _LearnableFakeQuantize, quiet
from qrecipe._torch_fx import FusedConvBatchNorm, FusedLinearBatchNorm
from qrecipe.errors.findings import ExecutionError
from qrecipe.model.call import Inputs
from qrecipe.model.copies import whole_copy
from qrecipe.model.nodes import called_modules
from qrecipe.process.memory import failing_as


def fake_quants(model: nn.Module) -> Iterator[FakeQuantizeBase]:
    """All fake-quants of a model, of weights and of activations."""
    for module in model.modules():
        if isinstance(module, FakeQuantizeBase):
            yield module


def activation_fake_quants(prepared: fx.GraphModule) -> Iterator[FakeQuantizeBase]:
    """The fake-quants that the graph calls; those of weights are inside modules."""
    for _, module in called_modules(prepared.graph):
        while isinstance(module, StandIn):  # names the fake-quant of a weight otherwise
            module = getattr(module, "activation_post_process", None)
        if isinstance(module, FakeQuantizeBase):
            yield module


def is_observing(fake_quant: FakeQuantizeBase) -> bool:
    """Whether its range still changes with the data."""
    return bool(_observer_switch(fake_quant)[0])


def has_seen_nothing(fake_quant: nn.Module) -> bool:
    """Whether its observer records extremes, but has none yet."""
    extreme = getattr(getattr(fake_quant, "activation_post_process", None), "min_val", None)
    return isinstance(extreme, torch.Tensor) and not (
        extreme.numel() and bool(torch.isfinite(extreme).all())
    )


def stop_observing(model: nn.Module) -> None:
    """Freeze all ranges, except for learnable ones."""
    for fake_quant in fake_quants(model):
        fake_quant.disable_observer()


@contextmanager
def not_observing(fake_quant: FakeQuantizeBase) -> Iterator[None]:
    """Round and do not observe inside a ``with``; a learnable one learns."""
    observes = bool(fake_quant.observer_enabled[0])
    fake_quant.disable_observer()
    try:
        yield
    finally:
        fake_quant.enable_observer(observes)


def freeze_batch_norm(model: nn.Module) -> None:
    """Use the running statistics from now on, also in training mode."""
    for module in model.modules():
        if isinstance(module, (FusedConvBatchNorm, FusedLinearBatchNorm)):
            module.freeze_bn_stats()  # type: ignore[no-untyped-call]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            if _rest in module._forward_pre_hooks.values():
                continue
            module.register_forward_pre_hook(_rest)


def _rest(module: nn.Module, args: Any) -> None:
    """Keep a frozen layer in eval mode after ``train()`` of the whole model."""
    module.eval()


def accompany_training(prepared: nn.Module) -> None:
    """Make fake-quants keep their ranges in eval mode, and learnable ones learn after one batch.

    In torch, observers also observe in eval mode, so that measuring a model changes it, and
    observed scales overwrite learnt ones until learning is enabled. Before the first batch there
    is no range, and tensors pass unchanged.
    """
    for fake_quant in fake_quants(prepared):
        fake_quant.register_forward_pre_hook(_rest_in_eval_mode)
        fake_quant.register_forward_hook(_go_on, always_call=True)


def _rest_in_eval_mode(fake_quant: nn.Module, args: Any) -> None:
    assert isinstance(fake_quant, FakeQuantizeBase)
    rests = not fake_quant.training and is_observing(fake_quant)
    passes = rests and bool(fake_quant.fake_quant_enabled[0]) and has_seen_nothing(fake_quant)
    if rests:
        fake_quant.disable_observer()
    if passes:
        fake_quant.disable_fake_quant()
    vars(fake_quant)["_rests"], vars(fake_quant)["_passes"] = rests, passes


def _go_on(fake_quant: nn.Module, args: Any, output: Any) -> None:
    assert isinstance(fake_quant, FakeQuantizeBase)
    if vars(fake_quant).pop("_passes", False):
        fake_quant.enable_fake_quant()
    if vars(fake_quant).pop("_rests", False):
        fake_quant.enable_observer()
    elif (
        isinstance(fake_quant, _LearnableFakeQuantize)
        and fake_quant.training
        and is_observing(fake_quant)
        and bool(fake_quant.fake_quant_enabled[0])
    ):
        fake_quant.enable_param_learning()
        _start_alike(fake_quant)


def _start_alike(learnable: _LearnableFakeQuantize) -> None:
    """Give all processes the first one's estimate: each has seen a different batch.

    DistributedDataParallel only synchronised the parameters at construction, before there was one.
    """
    if dist.is_available() and dist.is_initialized():
        for parameter in (learnable.scale, learnable.zero_point):
            dist.broadcast(parameter.data, src=0)


@contextmanager
def only_observing(prepared: nn.Module) -> Iterator[None]:
    """Run the model in eval mode with float values while its ranges are observed.

    Frozen ranges are observed too, and frozen again afterwards.
    """
    modes = {module: module.training for module in prepared.modules()}
    switches = {
        fake_quant: (bool(fake_quant.fake_quant_enabled[0]), is_observing(fake_quant))
        for fake_quant in fake_quants(prepared)
    }
    prepared.eval()
    for fake_quant in switches:
        fake_quant.train()  # in eval mode they don't observe
        fake_quant.disable_fake_quant()
        fake_quant.enable_observer()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for fake_quant, (rounds, observes) in switches.items():
            fake_quant.enable_fake_quant(rounds)
            fake_quant.enable_observer(observes)


def frozen_copy(prepared: fx.GraphModule, inputs: Inputs) -> fx.GraphModule:
    """The prepared part as it will be converted: in eval mode, ranges frozen, fake-quants enabled.

    Weights have changed since they were last observed, so weight ranges that are still observed
    are updated with the final weights, as in torch's own conversion. Raises ``ExecutionError``
    (QR405) if it does not run.
    """
    frozen = whole_copy(prepared).eval()
    for fake_quant in fake_quants(frozen):
        # from here on only the switches decide
        fake_quant._forward_pre_hooks.clear()
        fake_quant._forward_hooks.clear()
        fake_quant.enable_fake_quant()
    for fake_quant in activation_fake_quants(frozen):
        fake_quant.disable_observer()
    what = "the trained model cannot be run any more"
    hint = "train the model of compiled.prepare() as it is, without replacing parts of it"
    with torch.no_grad(), quiet(), failing_as(ExecutionError, "QR405", what, hint):
        inputs.call(frozen)
    stop_observing(frozen)
    return frozen


def _observer_switch(fake_quant: FakeQuantizeBase) -> torch.Tensor:
    if isinstance(fake_quant, _LearnableFakeQuantize):
        switch: torch.Tensor = fake_quant.static_enabled  # type: ignore[assignment]
        return switch
    return fake_quant.observer_enabled
