"""A `repr` of a few lines, whatever a value holds."""

from __future__ import annotations

import reprlib
import sys
from dataclasses import fields
from typing import Any

_WIDTH = 70
_ITEMS = 2


class _Short(reprlib.Repr):
    """Cuts what is long, and gives dtype and shape of a tensor instead of its values."""

    def __init__(self) -> None:
        super().__init__()
        self.maxtuple = self.maxlist = self.maxdict = self.maxset = self.maxfrozenset = _ITEMS
        self.maxstring = _WIDTH
        self.maxother = sys.maxsize

    def repr_Tensor(self, x: Any, level: int) -> str:  # noqa: N802
        return f"Tensor({str(x.dtype).removeprefix('torch.')}, {list(x.shape)})"

    def repr_instance(self, x: Any, level: int) -> str:
        # not reprlib's own cut, which takes the middle out of a class name and its first field
        text = " ".join(super().repr_instance(x, level).split())
        return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


short = _Short().repr


class ShortRepr:
    """Gives a dataclass that is made with ``repr=False`` a `repr` with each field cut short."""

    __slots__ = ()

    def __repr__(self) -> str:
        own: Any = self
        names = (each.name for each in fields(own) if each.repr)
        shown = ", ".join(f"{name}={short(getattr(own, name))}" for name in names)
        return f"{type(self).__qualname__}({shown})"
