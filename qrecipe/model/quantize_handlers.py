"""What torch derives from a backend config for every graph, derived once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from qrecipe._torch_fx import BackendConfig, _get_pattern_to_quantize_handlers, prepare
from qrecipe.process.state import alone


@lru_cache(maxsize=16)
def quantize_handlers(backend_config: BackendConfig) -> dict[Any, Any]:
    """The classes that torch makes of the patterns: some 200, which takes longer than matching."""
    return _get_pattern_to_quantize_handlers(backend_config)


@contextmanager
def handlers_made_once(backend_config: BackendConfig) -> Iterator[None]:
    """Inside, torch's ``prepare`` takes the handlers of this config from `quantize_handlers`."""
    names, name = prepare.__globals__, _get_pattern_to_quantize_handlers.__name__

    def handlers(config: BackendConfig) -> dict[Any, Any]:
        is_ours = config is backend_config
        return quantize_handlers(config) if is_ours else _get_pattern_to_quantize_handlers(config)

    with alone():
        names[name] = handlers
        try:
            yield
        finally:
            names[name] = _get_pattern_to_quantize_handlers
