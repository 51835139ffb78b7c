"""Write what documentation is made from the program itself: the tables of docs/format.md, between
their markers, and docs/commands.md.

python tools/reference.py       # a test fails where a page is not what this writes
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from qrecipe.cli.app import app
from qrecipe.recipe.json_schema import recipe_schema
from qrecipe.registry.builtin import FAKE_QUANTS, OBSERVERS

DOCS = Path(__file__).parents[1] / "docs"
FENCE = "`" * 3

TABLES = {
    "recipe": "",
    "tensor": "TensorSpec",
    "qconfig": "QConfigTable",
    "rules": "RulesTable",
    "rule": "RuleTable",
    "base": "BaseReference",
    "equalize": "EqualizeTable",
    "smooth": "SmoothTable",
    "calibration": "CalibrationTable",
    "qat": "QatTable",
    "fx": "FxTable",
    "lint": "LintTable",
}
"""Marker in the page -> the definition in the schema."""

SHOWN = {
    "TensorSpec": "a tensor spec",
    "QConfigTable": "a qconfig",
    "RuleTable": "a rule",
    "BaseReference": "a base",
    "observer": "an observer",
    "fake_quant": "a fake-quant",
    "RulesTable": "table",
    "TransformTable": "table",
    "EqualizeTable": "table",
    "SmoothTable": "table",
    "CalibrationTable": "table",
    "QatTable": "table",
    "FxTable": "table",
    "LintTable": "table",
}

COMMANDS = """\
# The commands

The `--help` of each command. The exit status is 0 if all is well, 1 if something was found, and 2
if the command was called wrongly. A *site* in these texts is a module, a fused group, or one call
of a function; the [glossary](glossary.md) has the other words.

On a terminal tables fit its width, and severity, carets and verdicts are coloured, unless
`NO_COLOR` is set. A pipe gets a line for each row and no colours. An existing file is only
replaced with `--force`. Whether the outputs can be written is checked before any work is done.
`qrecipe --install-completion` installs completion of commands and options for your shell.
"""


def main() -> None:
    """Write both pages anew."""
    page = DOCS / "format.md"
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    (DOCS / "commands.md").write_text(commands_page(), encoding="utf-8")


def with_tables(text: str) -> str:
    """The page with the lines between each pair of markers written anew."""
    for marker, lines in tables().items():
        begin, end = f"<!-- table: {marker} -->", "<!-- end -->"
        text, count = re.subn(
            f"{begin}\n.*?{end}",
            lambda _, made=f"{begin}\n\n{lines}\n\n{end}": made,
            text,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(f"docs/format.md has {count} pairs of markers for {marker}")
    return text


def tables() -> dict[str, str]:
    """Marker -> the table, as Markdown."""
    schema = recipe_schema()
    found = {
        marker: key_table(schema["definitions"][name] if name else schema)
        for marker, name in TABLES.items()
    }
    observers = [(name, each.target, each.parameters) for name, each in OBSERVERS.items()]
    fake_quants = [(name, each.target, each.parameters) for name, each in FAKE_QUANTS.items()]
    return {
        **found,
        "observers": markdown(("observer", "torch's", "arguments"), map(constructor, observers)),
        "fake-quants": markdown(
            ("fake-quant", "torch's", "arguments"), map(constructor, fake_quants)
        ),
    }


def key_table(definition: Mapping[str, Any]) -> str:
    """A line for each key: its values, its default, what it means."""
    rows = [
        (f"`{key}`", values(value), default(value), value.get("description", ""))
        for key, value in definition["properties"].items()
        if not value.get("$ref", "").endswith("Table")
    ]
    return markdown(("key", "value", "default", "meaning"), rows)


def values(value: Mapping[str, Any]) -> str:
    """What a key may be, in words."""
    if "$ref" in value:
        return SHOWN[value["$ref"].rpartition("/")[2]]
    if "anyOf" in value:
        return " or ".join(values(each) for each in value["anyOf"])
    if "enum" in value:
        return ", ".join(f"`{each}`" for each in value["enum"])
    if value["type"] == "array":
        return f"array of ({values(value['items'])})"
    if value["type"] == "object":
        return f"table of {values(value['additionalProperties'])}"
    return " ".join([value["type"], *bounds(value)])


def bounds(value: Mapping[str, Any]) -> Iterator[str]:
    if "pattern" in value:
        yield f"like `{value['pattern'].strip('^$')}`"
    elif "maximum" in value and value.get("minimum", 0) != 0:
        yield f"from {value['minimum']:.3g} to {value['maximum']}"
    elif "maximum" in value:
        yield f"from 0 to {value['maximum']}"
    elif "not" in value:
        yield f"above {value['minimum']}"
    elif "minimum" in value:
        yield f"from {value['minimum']}"


def default(value: Mapping[str, Any]) -> str:
    return f"`{str(value['default']).lower()}`" if "default" in value else ""


def constructor(entry: tuple[str, str, Mapping[str, str]]) -> tuple[str, str, str]:
    name, target, parameters = entry
    arguments = ", ".join(f"`{key}`: {tag}" for key, tag in parameters.items())
    return f"`{name}`", f"`{target.rpartition('.')[2]}`", arguments


def markdown(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def commands_page() -> str:
    """Each command's help, as a command that is run where the page is tested."""
    names = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    sections = [COMMANDS, block([]), *(f"## {name}\n\n{block([name])}" for name in names)]
    return "\n".join(sections)


def block(arguments: list[str]) -> str:
    result = CliRunner().invoke(app, [*arguments, "--help"], prog_name="qrecipe")
    command = " ".join(["qrecipe", *arguments, "--help"])
    return f"{FENCE}console\n$ {command}\n{result.output.strip()}\n{FENCE}\n"


if __name__ == "__main__":
    main()
