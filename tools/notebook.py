"""Runs the cells of a notebook and compares what they give with what is stored in it.

    python tools/notebook.py NOTEBOOK            # fails if a cell does, or gives something else
    python tools/notebook.py NOTEBOOK --write    # stores what the cells give

It needs no Jupyter: cells are plain Python, and the value of a last line is shown as a notebook
shows it, in HTML if it can be. Numbers may differ, as CPUs round differently, and so may the order
of lines that depends on them.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any


def main() -> None:
    as_written = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--write", action="store_true", help="store what the cells give")
    arguments = parser.parse_args()
    path = arguments.notebook.resolve()
    text = path.read_text(encoding="utf-8")
    document = json.loads(text)
    found = run(document, path.parent)
    if arguments.write:
        path.write_text(found, encoding="utf-8")
    elif differing := list(difflib.unified_diff(comparable(text), comparable(found), lineterm="")):
        sys.exit("\n".join([*differing, f"to store this: python tools/notebook.py {path} --write"]))
    else:
        print(f"{arguments.notebook}: {len(list(code_cells(document)))} cells run")


def run(document: dict[str, Any], folder: Path) -> str:
    """The document with the outputs of its cells, which run in this folder."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    warnings.simplefilter("ignore")
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(document), 1):
        cell["execution_count"] = number
        cell["outputs"] = list(outputs("".join(cell["source"]), number, names))
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def code_cells(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (cell for cell in document["cells"] if cell["cell_type"] == "code")


def outputs(source: str, number: int, names: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a cell prints, and the value of its last line."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with redirect_stdout(printed):
        exec(compile(tree, f"<cell {number}>", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"<cell {number}>", "eval"), names)
    if printed.getvalue():
        yield {"output_type": "stream", "name": "stdout", "text": lines(printed.getvalue())}
    if value is not None:
        data = {"text/plain": lines(repr(value))}
        if hasattr(value, "_repr_html_"):
            data = {"text/html": lines(value._repr_html_()), **data}
        result = {"output_type": "execute_result", "execution_count": number, "metadata": {}}
        yield {**result, "data": data}


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def comparable(text: str) -> list[str]:
    """The lines of a document without numbers and bars, in an order of their own."""
    return sorted(re.sub(r"[\d.█▏▎▍▌▋▊▉]+", "#", line).strip(" ,") for line in text.splitlines())


if __name__ == "__main__":
    main()
