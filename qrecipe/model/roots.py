"""``[fx] roots``: the parts of a model that are traced, and what each is called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from qrecipe.errors.findings import Finding, PlanError, error_from
from qrecipe.errors.spelling import did_you_mean
from qrecipe.errors.text import first_line
from qrecipe.model.call import Inputs
from qrecipe.model.copies import runnable_copy, with_parts
from qrecipe.model.dry_run import first_calls, try_out
from qrecipe.model.rewrite_proof import FLIPPED
from qrecipe.model.trace_proof import FEW_SAMPLES, difference
from qrecipe.process.state import random_numbers_kept


def inputs_of_roots(model: nn.Module, inputs: Inputs, roots: Sequence[str]) -> dict[str, Inputs]:
    """What each root is called with first in one run of the whole model, in the order of ``roots``.

    Raises ``PlanError``: a root that is no container of the model, or lies in another (QR301);
    one that the model never calls (QR301); inputs that the model cannot take (QR307); a forward
    that writes to the model's parameters (QR306).
    """
    _check(model, roots)
    taken = first_calls(model, roots, inputs)
    uncalled = [path for path in roots if path not in taken]
    if uncalled:
        raise error_from(
            Finding(
                "QR301",
                f'fx.roots "{path}" is not called on the example inputs',
                hint="a root has to be called as a module, root(x); root.forward(x) is no call",
                key="fx.roots",
            )
            for path in uncalled
        )
    return {path: taken[path] for path in roots}


def prove_whole(model: nn.Module, graphs: Mapping[str, nn.Module], inputs: Inputs) -> None:
    """Run the model with a graph in place of each root: it must compute what it computed before.

    Code around a root may look into it, ask for its class or call another method of it, and none
    of that survives tracing. Raises ``PlanError`` (QR306) where it shows.
    """
    few, expected = inputs, None
    for few in (inputs.first_samples(FEW_SAMPLES), inputs):
        try:
            with random_numbers_kept():  # both runs draw the same
                expected = try_out(runnable_copy(model), few.cloned(), model)
            break
        except Exception:
            if few is inputs:
                raise
    try:
        parts = {path: runnable_copy(graph) for path, graph in graphs.items()}
        with random_numbers_kept():
            actual = try_out(with_parts(model, parts), few.cloned(), model)
    except PlanError:
        raise
    except Exception as error:
        raise _depends_on_roots(f"does not run: {first_line(error)}") from error
    found = difference(expected, actual, FLIPPED)
    if found is not None:
        raise _depends_on_roots(f"computes something else: {found}")


def _depends_on_roots(what: str) -> PlanError:
    return PlanError(
        Finding(
            "QR306",
            f"with graphs in place of fx.roots the model {what}",
            hint="the code around a root may call it and nothing else: no other method or "
            "attribute of it, no isinstance, no hook that keeps what it sees",
            key="fx.roots",
        )
    )


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
