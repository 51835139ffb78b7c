"""What all commands have in common: how they are described, and how they fail."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from typer.core import TyperCommand

from qrecipe.cli.output import reported


class Command(TyperCommand):
    """A command whose warnings and errors become plain lines.

    Its help names arguments without their Python types, such as ``list[str]``.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for parameter in self.params:
            if parameter.param_type_name == "argument":
                vars(parameter)["display_type_rich"] = lambda ctx: None

    def invoke(self, ctx: Any) -> Any:
        given = ctx.params
        with reported(as_json=given.get("json", False), strict=given.get("strict", False)):
            return super().invoke(ctx)


def summary(command: Callable[..., None]) -> str:
    """The first sentence of a command's help, whole."""
    return (inspect.getdoc(command) or "").partition("\n\n")[0]
