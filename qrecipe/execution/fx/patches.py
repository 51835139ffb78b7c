"""torch's ``prepare`` and ``convert`` with some of their functions replaced while they run.

Some would do again for each node what has to be done once, and take more than linear time; others
are wrong about numbers and about weights that are computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from itertools import accumulate
from typing import Any

from torch import fx, nn

from qrecipe._torch_fx import (
    BackendConfig,
    _generate_node_name_to_qconfig,
    _get_pattern_to_quantize_handlers,
    _is_input_arg_dtype_supported_by_backend,
    _is_output_dtype_supported_by_backend,
    _is_reuse_input_qconfig,
    _qconfig_satisfies_dtype_config_constraints,
    all_node_args_have_no_tensors,
    convert,
    get_qconfig_dtypes,
    node_arg_is_bias,
    node_arg_is_weight,
    prepare,
    propagate_qconfig_,
    weight_is_quantized,
)
from qrecipe.model.matching import dtype_configs, quantizable_in, quantize_handlers, root_getters
from qrecipe.process.state import alone, replaced


@contextmanager
def without_repetition(model: nn.Module, backend_config: BackendConfig) -> Iterator[None]:
    """Inside, ``prepare`` of this model and config gives the same result sooner.

    It would make classes of the config's patterns for each graph and try all of them at each node,
    list them again for each node, create an observer for each question about a qconfig, list all
    modules for each observer that it inserts, and try all numbers from 0 for the observer's name.
    It would also make a qconfig of its own for each module, to have the observers on its device,
    and then ask everything about each of them.
    """
    ours = {
        "_find_matches": quantizable_in,
        "_get_pattern_to_quantize_handlers": _handlers_of(backend_config),
        "get_fusion_pattern_to_root_node_getter": root_getters,
        "get_pattern_to_dtype_configs": dtype_configs,
        "_qconfig_satisfies_dtype_config_constraints": _asked_once(
            _qconfig_satisfies_dtype_config_constraints, _constraints
        ),
        "_is_input_arg_dtype_supported_by_backend": _asked_once(
            _is_input_arg_dtype_supported_by_backend, _input
        ),
        "_is_output_dtype_supported_by_backend": _asked_once(
            _is_output_dtype_supported_by_backend, _output
        ),
        "_is_reuse_input_qconfig": cache(_is_reuse_input_qconfig),
        "get_qconfig_dtypes": cache(get_qconfig_dtypes),
        "get_new_attr_name_with_prefix": _names_counted(),
    }
    same = {"_add_module_to_qconfig_obs_ctr": lambda qconfig, module: qconfig}  # all on the CPU
    with (
        alone(),
        replaced(prepare.__globals__, ours),
        replaced(propagate_qconfig_.__globals__, same),
        replaced(_generate_node_name_to_qconfig.__globals__, same),
    ):
        modules = _Noting(model._modules)
        vars(model).update(_modules=modules, named_modules=_listed_once(model, modules))
        try:
            yield
        finally:
            vars(model)["_modules"] = dict(modules)
            del vars(model)["named_modules"]


@contextmanager
def unused_looked_up() -> Iterator[None]:
    """Inside, torch deletes unused modules by `delete_unused_submodules`."""
    with alone():
        former = fx.GraphModule.delete_all_unused_submodules
        fx.GraphModule.delete_all_unused_submodules = delete_unused_submodules  # type: ignore
        try:
            yield
        finally:
            fx.GraphModule.delete_all_unused_submodules = former  # type: ignore


def delete_unused_submodules(graph_module: fx.GraphModule) -> None:
    """As torch's ``delete_all_unused_submodules``, which looks each module up in a list."""
    used: set[str] = set()
    for node in graph_module.graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        target = str(node.target)
        used.update(accumulate(target.split("."), lambda path, name: f"{path}.{name}"))
        with suppress(AttributeError):  # of a module that is not there
            if node.op == "call_module":
                inside = graph_module.get_submodule(target).named_modules(prefix=target)
                used.update(name for name, _ in inside)
    for name in [name for name, _ in graph_module.named_modules() if name not in used]:
        graph_module.delete_submodule(name)


@contextmanager
def qconfigs_asked_once() -> Iterator[None]:
    """Inside, ``convert`` asks each qconfig once what it quantizes, and not for each module."""
    ours = {"weight_is_quantized": cache(weight_is_quantized)}
    same = {"get_qconfig_dtypes": cache(get_qconfig_dtypes)}
    with (
        alone(),
        replaced(convert.__globals__, ours),
        replaced(_generate_node_name_to_qconfig.__globals__, same),
    ):
        yield


def _handlers_of(own: BackendConfig) -> Callable[[BackendConfig], dict[Any, Any]]:
    def handlers(config: BackendConfig) -> dict[Any, Any]:
        return (quantize_handlers if config is own else _get_pattern_to_quantize_handlers)(config)

    return handlers


def _asked_once(ask: Callable[..., bool], key_of: Callable[..., Any]) -> Callable[..., bool]:
    """A function that is asked once for each key, and each time for what has none."""
    asked: dict[Any, tuple[Any, bool]] = {}

    def answer(*given: Any, **named: Any) -> bool:
        key = key_of(*given, **named)
        if key is None:
            return ask(*given, **named)
        if key not in asked:  # with the arguments, so that none can get the same id
            asked[key] = (given, named), ask(*given, **named)
        return asked[key][1]

    return answer


def _constraints(qconfig: Any, constraints: Any, is_activation: bool = True) -> Any:
    return qconfig, id(constraints), is_activation


def _input(arg: Any, node: fx.Node, qconfig: Any, config: Any, backend: Any) -> Any:
    if not isinstance(arg, fx.Node):
        return None
    role = "weight" if node_arg_is_weight(node, arg) else "input_act"
    role = "bias" if node_arg_is_bias(node, arg) else role
    return role, _observer_of(node, role), qconfig, id(config)


def _output(node: fx.Node, qconfig: Any, config: Any) -> Any:
    return _observer_of(node, "output_act"), qconfig, id(config)


def _observer_of(node: fx.Node, role: str) -> Any:
    """What makes an observer of a node: the answers depend on nothing else of it."""
    return node.meta["target_dtype_info"].get(f"{role}_obs_or_fq_ctr", role)


def _names_counted() -> Callable[[str], Callable[[nn.Module], str]]:
    next_number: Counter[tuple[nn.Module, str]] = Counter()

    def free_name_with_prefix(prefix: str) -> Callable[[nn.Module], str]:
        stem = prefix.replace(".", "_")

        def free_name(module: nn.Module) -> str:
            while hasattr(module, name := f"{stem}{next_number[module, stem]}"):
                next_number[module, stem] += 1
            return name

        return free_name

    return free_name_with_prefix


class _Noting(dict[str, Any]):
    """The modules of a model, and those that were set since somebody looked."""

    def __init__(self, modules: Mapping[str, Any]) -> None:
        super().__init__(modules)
        self.changed: dict[str, Any] = {}

    def __setitem__(self, name: str, module: Any) -> None:
        super().__setitem__(name, module)
        self.changed[name] = module


def _listed_once(model: nn.Module, modules: _Noting) -> Callable[..., Any]:
    """``prepare`` only adds modules to the model itself."""
    listed = model.named_modules
    known: dict[str, Any] = {}

    def named_modules(memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        if remove_duplicate:
            return listed(memo, prefix)
        known.update(modules.changed if known else listed(remove_duplicate=False))
        modules.changed.clear()
        return known

    return named_modules


@contextmanager
def numbers_unobserved() -> Iterator[None]:
    """Inside, ``prepare`` takes for numbers what was recorded as one, and nothing else.

    torch recognises numbers by the name of what returns them: ``size``, ``shape`` and ``ndim``,
    but neither ``dim`` nor ``numel``. Its observers fail on numbers. What is made of numbers alone,
    as ``torch.zeros(1, n)`` is, it takes for a number, and fails where a kernel reads it.
    """
    with alone(), replaced(prepare.__globals__, {"all_node_args_have_no_tensors": _is_no_tensor}):
        yield


def _is_no_tensor(node: Any, modules: Any, cache: Any) -> bool:
    value = node.meta.get("value") if isinstance(node, fx.Node) else None
    if value is not None and (value.is_float or not value.is_tensor):
        return not value.is_float
    is_none: bool = all_node_args_have_no_tensors(node, modules, cache)
    return is_none


@contextmanager
def computed_weights_left_alone() -> Iterator[None]:
    """Inside, ``convert`` does not run what computes the weights of functions.

    It would do so to let an observer see the weight. Such functions stay float and have none.
    """
    ours = {"_run_weight_observers": lambda observed, backend_config: None}
    with alone(), replaced(convert.__globals__, ours):
        yield
