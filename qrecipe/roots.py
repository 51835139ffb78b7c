"""``[fx] roots``: the parts of a model that are traced, and what each is called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from qrecipe.copying import runnable_copy
from qrecipe.errors import Finding, PlanError, did_you_mean, error_from, first_line
from qrecipe.inputs import Inputs


def inputs_of_roots(model: nn.Module, inputs: Inputs, roots: Sequence[str]) -> dict[str, Inputs]:
    """What each root is called with first in one run of the whole model, in the order of ``roots``.

    Raises ``PlanError``: a root that is no container of the model, or lies in another (QR301);
    one that the model never calls (QR301); inputs that the model cannot take (QR307).
    """
    _check(model, roots)
    taken: dict[str, Inputs] = {}
    probe = runnable_copy(model)
    for path in roots:
        probe.get_submodule(path).register_forward_pre_hook(
            partial(_take, taken, path), with_kwargs=True
        )
    try:
        with torch.no_grad():
            inputs.call(probe)
    except Exception as error:
        raise PlanError(
            Finding("QR307", f"the model cannot take the example inputs: {first_line(error)}")
        ) from error
    uncalled = [path for path in roots if path not in taken]
    if uncalled:
        raise error_from(
            Finding(
                "QR301", f'fx.roots "{path}" is not called on the example inputs', key="fx.roots"
            )
            for path in uncalled
        )
    return {path: taken[path] for path in roots}


def _take(
    taken: dict[str, Inputs],
    path: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    taken.setdefault(path, Inputs(args, dict(kwargs)))


def _check(model: nn.Module, roots: Sequence[str]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    findings = [finding for path in roots if (finding := _problem(path, roots, modules))]
    if findings:
        raise error_from(findings)


def _problem(path: str, roots: Sequence[str], modules: Mapping[str, nn.Module]) -> Finding | None:
    if path not in modules or not path:
        return Finding(
            "QR301",
            f'fx.roots "{path}" is no module of the model',
            hint=did_you_mean(path, [name for name in modules if name]),
            key="fx.roots",
        )
    if type(modules[path]).__module__.startswith("torch.nn") and not list(modules[path].children()):
        return Finding(
            "QR301",
            f'fx.roots "{path}" is a single {type(modules[path]).__name__}, with nothing to trace',
            hint="name the module around it",
            key="fx.roots",
        )
    if list(roots).count(path) > 1:
        return Finding(
            "QR301",
            f'fx.roots "{path}" stands there twice',
            hint="name it once",
            key="fx.roots",
        )
    outer = next((root for root in roots if root != path and path.startswith(f"{root}.")), None)
    if outer is not None:
        return Finding(
            "QR301",
            f'fx.roots "{path}" lies inside "{outer}"',
            hint="name one of them",
            key="fx.roots",
        )
    return None
