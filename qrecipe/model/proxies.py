"""Proxies that can be asked for a plain value, which their tracer may know."""

from __future__ import annotations

import ast
import linecache
import operator
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import Attribute

IN_PLACE = "in place"
"""Set in the ``meta`` of calls that change their first argument, if that is a tensor."""


class AskingProxy(fx.Proxy):
    """A proxy that asks its tracer for what Python needs as a number or a length.

    Sizes are of their class, and are found in sets and dicts as the numbers that they are. So are
    texts of them, if they are more than messages.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self._kind() or type(self)

    def __hash__(self) -> int:
        kind = self._kind()
        if kind is None:
            return id(self)
        return hash(self._asked(int)) if kind is int else int(self._asked(hash))

    def __str__(self) -> str:
        return str(self._asked(str)) if self._is_text(sys._getframe(1)) else super().__str__()

    def __format__(self, form: str) -> str:
        if not self._is_text(sys._getframe(1)):
            return super().__format__(form)
        kind = self._kind()
        return format(self._asked(str if kind is torch.Size else kind), form)

    def __getattr__(self, k: str) -> _AskingAttribute:
        return _AskingAttribute(self, k)

    def __int__(self) -> int:
        return int(self._asked(int))

    def __float__(self) -> float:
        return float(self._asked(float))

    def __len__(self) -> int:
        return int(self._asked(len))

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __round__(self, digits: int | None = None) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", round, (self, digits), {})

    def __divmod__(self, other: Any) -> tuple[fx.Proxy, fx.Proxy]:
        return self // other, self % other

    def _is_text(self, asking: FrameType) -> bool:
        """Whether a frame makes a text of a size, and may compute with it."""
        return self._kind() is not None and not _is_shown(asking)

    def _kind(self) -> Any:
        node = self.node  # that of an attribute is made now
        return self.tracer.kinds.get(node)  # type: ignore[attr-defined]

    def _asked(self, kind: Callable[[Any], Any]) -> Any:
        return self.tracer.asked(self, kind)  # type: ignore[attr-defined]


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """An operator like ``+=``, which torch traces as ``+``."""

    def change(self: Any, other: Any) -> Any:
        changed = function(self, other)
        changed.node.meta[IN_PLACE] = True
        return changed

    return change


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    setattr(AskingProxy, f"__i{_name}__", _in_place(getattr(operator, f"__{_name}__")))


class _AskingAttribute(Attribute, AskingProxy):
    """An attribute of such a proxy, as in ``x.shape``."""


_OURS = (Path(torch.__file__).parent, Path(__file__).parents[1])
_SHOWN = (ast.Assert, ast.Raise, ast.Expr)
"""Statements that keep no text: of an ``ast.Expr``, nobody reads the value."""


def _is_shown(frame: FrameType) -> bool:
    """Whether the line that a frame is at only shows the texts that it makes.

    Lines without a source and lines of torch count as such too.
    """
    name = frame.f_code.co_filename
    if any(map(Path(name).is_relative_to, _OURS)):
        return True
    at = frame.f_lineno
    around = [each for each in _statements(name) if each.lineno <= at <= (each.end_lineno or 0)]
    return not around or isinstance(
        max(around, key=lambda each: (each.lineno, each.col_offset)), _SHOWN
    )


@lru_cache(maxsize=64)
def _statements(filename: str) -> tuple[ast.stmt, ...]:
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return ()
    return tuple(node for node in ast.walk(tree) if isinstance(node, ast.stmt))
