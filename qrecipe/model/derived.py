"""What torch derives from configs for each graph and node again, derived once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

from qrecipe._torch_fx import (
    BackendConfig,
    _get_pattern_to_quantize_handlers,
    _qconfig_satisfies_dtype_config_constraints,
    get_qconfig_dtypes,
    prepare,
)
from qrecipe.process.state import alone


@lru_cache(maxsize=16)
def quantize_handlers(backend_config: BackendConfig) -> dict[Any, Any]:
    """The classes that torch makes of the patterns: some 200, which takes longer than matching."""
    return _get_pattern_to_quantize_handlers(backend_config)


@contextmanager
def derived_once(backend_config: BackendConfig) -> Iterator[None]:
    """Inside, torch's ``prepare`` takes the handlers of this config from `quantize_handlers`.

    It also keeps what it asks of a qconfig: torch creates an observer for each question.
    """
    asked: dict[tuple[Any, int, bool], tuple[Any, bool]] = {}

    def handlers(config: BackendConfig) -> dict[Any, Any]:
        is_ours = config is backend_config
        return quantize_handlers(config) if is_ours else _get_pattern_to_quantize_handlers(config)

    def satisfies(qconfig: Any, constraints: Any, is_activation: bool = True) -> bool:
        key = qconfig, id(constraints), is_activation
        if key not in asked:  # with the constraints, so that none can get the same id
            answer = _qconfig_satisfies_dtype_config_constraints(
                qconfig, constraints, is_activation
            )
            asked[key] = constraints, answer
        return asked[key][1]

    names = prepare.__globals__
    ours = {
        "_get_pattern_to_quantize_handlers": handlers,
        "_qconfig_satisfies_dtype_config_constraints": satisfies,
        "get_qconfig_dtypes": cache(get_qconfig_dtypes),
    }
    with alone():
        former = {name: names[name] for name in ours}
        names.update(ours)
        try:
            yield
        finally:
            names.update(former)
