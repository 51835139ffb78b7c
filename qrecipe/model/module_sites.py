"""Model -> sites without tracing: the modules called in one run of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from qrecipe._torch_fx import BackendConfig, ObservationType
from qrecipe.errors.findings import Finding
from qrecipe.model.addresses import module_member
from qrecipe.model.altered_modules import alteration
from qrecipe.model.call import Inputs
from qrecipe.model.class_names import is_leaf, is_torchs_own
from qrecipe.model.copies import runnable_copy
from qrecipe.model.dry_run import around_calls, drawing_nothing, try_inputs, version
from qrecipe.model.graph_sites import Inventory, Match, structure_of
from qrecipe.model.scaled_input import class_without_scale
from qrecipe.model.trace_proof import is_same, is_wrapped
from qrecipe.recipe.schema import FxTable
from qrecipe.rules.structure import Kind, Operation, enclosing

_WITH_FAST_PATH = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)

_WRAPPED = (
    "it is called in a transform of torch.func, such as vmap, which would run a quantized kernel "
    "sample by sample"
)


def take_inventory(
    model: nn.Module, inputs: Inputs, table: FxTable, backend_config: BackendConfig, why: Finding
) -> Inventory:
    """The sites of a model that cannot be traced, and ``why``: the leaf modules that it calls.

    Functions are invisible, and a module that is called twice is one site. As in tracing, torch's
    own modules are sites as a whole, and modules that return their input are not sites.

    Raises ``PlanError``: the model does not accept the inputs (QR307), or it draws random numbers
    or writes to its parameters (QR306).
    """
    called = _called(model, inputs)
    stops = {path for path in called if _stops(path, model.get_submodule(path), table)}
    stops |= {path for path in ("", *called) if _takes_fast_path(path, model, called)}
    paths = [
        path for path in called if path in stops and not stops.intersection(enclosing(path)[1:])
    ]
    idle = [
        path
        for path in paths
        if called[path].is_idle and alteration(model.get_submodule(path)) is None
    ]
    busy = module_matches(model, [p for p in paths if p not in idle], backend_config)
    matches = {
        path: replace(
            match, shape=called[path].shape, whole=_WRAPPED if called[path].is_wrapped else None
        )
        for path, match in busy.items()
    }
    members = [module_member(path, model.get_submodule(path)) for path in idle]
    structure = structure_of(model, matches, idle=members)
    unreached = _unreached(model, called, stops)
    return Inventory(model, (), matches, structure, untraced=why, unreached=unreached)


def module_matches(
    model: nn.Module, paths: Iterable[str], backend_config: BackendConfig
) -> dict[str, Match]:
    """The modules at these paths as sites."""
    matches: dict[str, Match] = {}
    for path in paths:
        module = model.get_submodule(path)
        config = backend_config._pattern_complex_format_to_config.get(class_without_scale(module))
        operation = Operation((module_member(path, module),), _kind(config), ())
        kernels = () if config is None else tuple(config.dtype_configs)
        matches[path] = Match(operation, (), module, kernels)
    return matches


@dataclass(slots=True)
class _Calls:
    """What the calls of a module were; idle ones return their input, whose first shape is kept."""

    is_idle: bool = True
    shape: tuple[int, ...] | None = None
    is_wrapped: bool = False


def _called(model: nn.Module, inputs: Inputs) -> dict[str, _Calls]:
    """The calls of a run by the canonical paths of the modules, in order."""
    probe = runnable_copy(model)
    called: dict[str, _Calls] = {}

    def noted(path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls = called.setdefault(path, _Calls())
        given = next(iter((*args, *kwargs.values())), None)
        if isinstance(given, Tensor) and calls.shape is None:
            calls.shape = tuple(given.shape)
        calls.is_wrapped |= is_wrapped(given)
        before = version(given)
        result = forward(*args, **kwargs)
        calls.is_idle &= is_same(result, given) and version(given) == before
        return result

    around_calls(probe, [path for path, _ in probe.named_modules() if path], noted)
    with drawing_nothing():
        try_inputs(probe, inputs.cloned(), model)
    return called


def _unreached(model: nn.Module, called: Iterable[str], stops: set[str]) -> tuple[str, ...]:
    """Modules with their own weights that no call reached, except those inside one site."""
    reached = set(called)
    return tuple(
        path
        for path, module in model.named_modules()
        if path not in reached
        and next(module.parameters(recurse=False), None) is not None
        and not any(
            outer in stops or is_torchs_own(type(model.get_submodule(outer)))
            for outer in enclosing(path)[1:-1]
        )
    )


def _stops(path: str, module: nn.Module, table: FxTable) -> bool:
    """Whether tracing would not look inside."""
    return not list(module.children()) or is_leaf(path, module, table)


def _takes_fast_path(path: str, model: nn.Module, called: Iterable[str]) -> bool:
    """Whether torch reads the weights inside a module instead of calling what holds them.

    A quantized module has no weight to read. torch's own forward chooses by the inputs, and may
    read the weights for others than these; another one may call torch's.
    """
    module = model.get_submodule(path)
    if not isinstance(module, _WITH_FAST_PATH):
        return False
    inside = f"{path}." if path else ""
    is_torchs = type(module).forward.__module__.startswith("torch.nn")
    return is_torchs or not any(other.startswith(inside) for other in called)


def _kind(config: Any) -> Kind:
    if config is None:
        return "unmatched"
    shares = config.observation_type == ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT
    return "passthrough" if shares else "observed"
