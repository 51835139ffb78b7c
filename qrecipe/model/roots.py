"""``[fx] roots``: the parts of a model that are traced, and their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from qrecipe.errors.findings import Finding, PlanError, error_from
from qrecipe.errors.spelling import did_you_mean
from qrecipe.errors.text import first_line
from qrecipe.model.call import Inputs, constants, on_few
from qrecipe.model.copies import failing_quietly, runnable_copy, with_parts
from qrecipe.model.dry_run import first_calls, try_out
from qrecipe.model.rewrite_proof import FLIPPED
from qrecipe.model.trace_proof import difference
from qrecipe.process.state import random_numbers_kept


def inputs_of_roots(model: nn.Module, inputs: Inputs, roots: Sequence[str]) -> dict[str, Inputs]:
    """The inputs of the first call of each root in a run of the whole model.

    Raises ``PlanError``: a root is not a container of the model, is inside another one or is never
    called (QR301); the model does not accept the inputs (QR307); its forward writes to its
    parameters (QR306).
    """
    if findings := list(root_findings(model, roots)):
        raise error_from(findings)
    taken = first_calls(model, roots, inputs)
    uncalled = [path for path in roots if path not in taken]
    if uncalled:
        raise error_from(
            Finding(
                "QR301",
                f'fx.roots "{path}" is not called on the example inputs',
                hint="a root must be called as a module: root(x), not root.forward(x)",
                key="fx.roots",
            )
            for path in uncalled
        )
    return {path: taken[path] for path in roots}


def sizes_of_roots(
    model: nn.Module, inputs: Inputs, inputs_of: Mapping[str, Inputs]
) -> dict[str, frozenset[str]]:
    """The numbers that each root is given and that change with the batch size, by parameter."""
    numbers = {path: _numbers(model, path, given) for path, given in inputs_of.items()}
    other = inputs.of_another_size()
    if other is None or not any(numbers.values()):
        return {}
    try:
        calls = first_calls(model, list(numbers), other)
    except PlanError:  # the model itself does not accept another size
        return {}
    return {
        path: frozenset(dict(numbers[path].items() - _numbers(model, path, call).items()))
        for path, call in calls.items()
    }


def _numbers(model: nn.Module, path: str, inputs: Inputs) -> dict[str, float]:
    given = constants(model.get_submodule(path), inputs)
    return {name: value for name, value in given.items() if type(value) in (int, float)}


def prove_whole(model: nn.Module, graphs: Mapping[str, nn.Module], inputs: Inputs) -> None:
    """Check that the model computes the same with a graph in place of each root.

    Code around a root may look into it, check its class or call other methods, none of which works
    after tracing. Raises ``PlanError`` (QR306) in that case.
    """

    def compare(few: Inputs) -> None:
        with random_numbers_kept():  # both runs draw the same numbers
            expected = try_out(runnable_copy(model), few.cloned(), model)
        try:
            parts = {path: runnable_copy(graph) for path, graph in graphs.items()}
            with random_numbers_kept():
                actual = try_out(failing_quietly(with_parts(model, parts)), few.cloned(), model)
        except PlanError:
            raise
        except Exception as error:
            looks_inside = isinstance(error, (AttributeError, TypeError))
            hint = _LOOKS_INSIDE if looks_inside else _ONLY_CALLS
            raise _depends_on_roots(f"does not run: {first_line(error)}", hint) from error
        found = difference(expected, actual, FLIPPED)
        if found is not None:
            raise _depends_on_roots(f"computes something else: {found}", _ONLY_CALLS)

    on_few(inputs, compare)


_ONLY_CALLS = (
    "the code around a root may only call it and read plain attributes: no tensors, modules or "
    "other methods, no isinstance, no hooks that keep what they see"
)
_LOOKS_INSIDE = (
    f"{_ONLY_CALLS}; attributes of modules inside a root are not kept: name the module whose code "
    "reads them as the root"
)


def _depends_on_roots(what: str, hint: str) -> PlanError:
    return PlanError.of(
        "QR306", f"with graphs in place of fx.roots the model {what}", hint=hint, key="fx.roots"
    )


def root_findings(model: nn.Module, roots: Sequence[str]) -> Iterator[Finding]:
    """Roots that are not containers of the model, or are inside each other (QR301)."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in roots:
        if (problem := _problem(path, roots, modules)) is not None:
            what, hint = problem
            yield Finding("QR301", f'fx.roots "{path}" {what}', hint=hint, key="fx.roots")


def _problem(
    path: str, roots: Sequence[str], modules: Mapping[str, nn.Module]
) -> tuple[str, str | None] | None:
    """What is wrong with a root, and how to mend it."""
    if path not in modules or not path:
        return "is not a module of the model", did_you_mean(path, filter(None, modules))
    kind = type(modules[path])
    if kind.__module__.startswith("torch.nn") and not list(modules[path].children()):
        return f"is a single {kind.__name__}, with nothing to trace", "name the module around it"
    if list(roots).count(path) > 1:
        return "is named twice", "remove one"
    outer = next((root for root in roots if root != path and path.startswith(f"{root}.")), None)
    return None if outer is None else (f'is inside "{outer}"', "remove one of them")
