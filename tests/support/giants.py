"""Recipes of up to a megabyte, each as slow as its kind of text can be and made on its call."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate, islice, takewhile

from qrecipe.recipe.toml.document import MAX_BYTES, MAX_ITEMS

HEAD = 'format = 1\nbackend = "x86"\nrules.global = "float"\n'
_TENSOR = 'observer = "minmax"\ndtype = "int8"\nqscheme = "per_tensor_affine"\n'


def _filled(head: str, lines: Iterable[str], tail: str = "") -> str:
    """As many of the lines as fit."""
    room = MAX_BYTES - len(head) - len(tail)
    kept = list[str]()
    for line in lines:
        room -= len(line)
        if room < 0:
            break
        kept.append(line)
    return head + "".join(kept) + tail


def _numbered(text: str) -> Iterator[str]:
    return (text.replace("%", f"{index:x}") for index in range(MAX_BYTES))


def _rules(tier: str, text: str, head: str = HEAD) -> str:
    return _filled(f"{head}[rules.{tier}]\n", _numbered(text))


def _first(count: int, text: str) -> str:
    """The first lines of a giant."""
    return "".join(text.splitlines(keepends=True)[:count])


_LINE = "format=1\nbackend='x86'\nrules={global='float',module_name={"
_DEEP = ".".join(["a"] * 90)

GIANTS: dict[str, Callable[[], str]] = {
    "short keys": lambda: _filled("", _numbered("k%=1\n")),
    "unknown keys": lambda: _filled(HEAD, _numbered("unknown% = 1\n")),
    "short rules": lambda: _rules("module_name", "k%='float'\n"),
    "long rules": lambda: _rules("module_name", "layer%={qconfig='float',expect=1,reason='why'}\n"),
    "header rules": lambda: _filled(HEAD, _numbered("[rules.module_name.k%]\nqconfig='float'\n")),
    "dotted rules": lambda: _filled(HEAD, _numbered("rules.module_name.k%.qconfig='float'\n")),
    "patterns": lambda: _rules("module_name", f"'{'*a' * 245}%'='float'\n"),
    "braces": lambda: _rules("module_name", "'{" + "a,*b,?c," * 60 + "%}'='float'\n"),
    "classes": lambda: _rules("module_name", f"'[{'a-z' * 160}]%'='float'\n"),
    "bad patterns": lambda: _rules("module_name", "'{%'='float'\n"),
    "types": lambda: _rules("module_type", "'a.B%'='float'\n"),
    "unknown types": lambda: _rules("module_type", "'torch.nn.Linea%'='float'\n"),
    "unknown functions": lambda: _rules("function", "'torch.matmul%'='float'\n"),
    "undefined qconfigs": lambda: _rules("module_name", "k%='q%'\n"),
    "tensors": lambda: _filled(HEAD, _numbered(f"[tensor.t%]\n{_TENSOR}")),
    "bad tensors": lambda: _filled(HEAD, _numbered("[tensor.t%]\nobserver='minmaxx'\n")),
    "bare tensors": lambda: _filled(HEAD, _numbered("[tensor.t%]\nreduce_range=true\n")),
    "empty tensors": lambda: _filled(HEAD, _numbered("[tensor.t%]\n")),
    "bad qconfigs": lambda: _filled(HEAD, _numbered("[qconfig.q%]\nweight='x%'\n")),
    "rules and qconfigs": lambda: (
        _first(5_000, _rules("module_name", "k%='q%'\n"))
        + _first(5_000, _filled("[qconfig]\n", _numbered("q%={weight='t'}\n")))
        + f"[tensor.t]\n{_TENSOR}"
    ),
    "unused qconfigs": lambda: _filled(
        f"{HEAD}[tensor.t]\n{_TENSOR}[qconfig]\n", _numbered("q%={weight='t'}\n")
    ),
    "unused tensors of many qconfigs": lambda: (
        _first(
            2_000,
            _filled(
                f"{HEAD}[tensor]\n",
                _numbered("t%={observer='minmax',dtype='int8',qscheme='per_tensor_affine'}\n"),
            ),
        )
        + _first(4_000, _filled("[qconfig]\n", _numbered("q%={weight='t%'}\n")))
    ),
    "one line": lambda: _filled(_LINE, _numbered("k%='float',"), "z='float'}}"),
    "one line to clean": lambda: _filled(
        f"{_LINE}'\u202e'='float',", _numbered("k%='float',"), "z='float'}}"
    ),
    "one long line": lambda: _filled(
        f"{_LINE}'\u202e'={{qconfig='float',reason='{'x' * 900_000}'}},",
        islice(_numbered("k%='float',"), 9_000),
        "z='float'}}",
    ),
    "one line of mistakes": lambda: _filled("x={", _numbered("k%=nan,"), "z=1}"),
    "numbers": lambda: _filled("name = [", ["1,"] * MAX_BYTES, "]"),
    "floats not finite": lambda: _filled("name = [", ["nan,"] * MAX_BYTES, "]"),
    "arguments": lambda: _filled(
        f"{HEAD}[tensor.t.observer]\nname = 'minmax'\nx = [", ["1,"] * MAX_BYTES, "]"
    ),
    "argument keys": lambda: _filled(
        f"{HEAD}[tensor.t.observer]\nname = 'minmax'\n", _numbered("k%=1\n")
    ),
    "empty arrays": lambda: _filled("name = [", ["[],"] * MAX_BYTES, "]"),
    "empty tables": lambda: _filled("name = [", ["{},"] * MAX_BYTES, "]"),
    "arrays of tables": lambda: _filled("", ["[[a]]\n"] * MAX_BYTES),
    "array of tensors": lambda: _filled("", _numbered("[[tensor.t%]]\n")),
    "deep headers": lambda: _filled("", _numbered(f"[{_DEEP}.k%]\n")),
    "deep keys": lambda: _filled("", _numbered(f"{_DEEP}.k%=1\n")),
    "short keys under a deep header": lambda: _filled(f"[{_DEEP}]\n", _numbered("k%=1\n")),
    "too deep header": lambda: _filled("[" + ".".join(["a"] * 990) + "]\n", _numbered("k%=1\n")),
    "too deep keys": lambda: _filled("", _numbered(".".join(["a"] * 900) + ".k%=1\n")),
    "dots": lambda: "a" + ".a" * (MAX_BYTES // 2 - 5) + "=1",
    "brackets": lambda: "a=" + "[" * (MAX_BYTES - 2),
    "nested arrays": lambda: _filled("name = [", ["[" * 90 + "]" * 90 + ","] * MAX_BYTES, "]"),
    "quoted keys": lambda: _filled("", _numbered('"\\u0061%"=1\n')),
    "repeated key at the end": lambda: _filled("", _numbered("k%=1\n"), "k0=1\n"),
    "repeated header": lambda: _filled("", _numbered("[k%]\n"), "[k0]\n"),
    "syntax error at the end": lambda: _filled("", _numbered("k%=1\n"), "?"),
    "open string": lambda: 'a = """' + '\\n"' * 300_000,
    "quotes": lambda: "a = ''" + "'" * (MAX_BYTES - 6),
    "escapes": lambda: 'a = "' + "\\n" * (MAX_BYTES // 2 - 4) + '"',
    "comments": lambda: _filled("", ["#\n"] * MAX_BYTES),
    "one comment": lambda: "#" * MAX_BYTES,
    "blank lines": lambda: "\n" * MAX_BYTES,
    "spaces": lambda: " " * MAX_BYTES,
    "carriage returns": lambda: "\r\n" * (MAX_BYTES // 2),
    "long key": lambda: f"{'k' * (MAX_BYTES - 4)} =1",
    "long string": lambda: f"name = '{'x' * (MAX_BYTES - 20)}'\n",
    "long pattern": lambda: (
        f"{HEAD}[rules.module_name]\n'{'*a' * (MAX_BYTES // 2 - 80)}'='float'\n"
    ),
    "long type": lambda: (
        f"{HEAD}[rules.module_type]\n'{'torch.' * (MAX_BYTES // 6 - 80)}x'='float'\n"
    ),
    "long qconfig": lambda: f"format=1\nbackend='x86'\nrules.global='{'q' * (MAX_BYTES - 80)}'\n",
    "long backend": lambda: f"backend='{'q' * (MAX_BYTES - 80)}'\n",
    "long reference": lambda: f"extends='./{'q/' * (MAX_BYTES // 2 - 80)}a.toml'\n",
    "parents": lambda: f"extends='{'../' * (MAX_BYTES // 3 - 80)}a.toml'\n",
    "bases": lambda: _filled("extends=[", _numbered("'./%.toml',"), "]"),
    "same bases": lambda: _filled("extends=[", ["'builtin:x86-static',"] * MAX_BYTES, "]"),
    "bases that are tables": lambda: _filled(
        "extends=[", _numbered("{recipe='./%.toml',x=1},"), "]"
    ),
    "odd bases": lambda: _filled("extends=[", ["1,"] * MAX_BYTES, "]"),
    "ignored codes": lambda: _filled(f"{HEAD}[lint]\nignore=[", ["'QR214',"] * MAX_BYTES, "]"),
    "bad codes": lambda: _filled(f"{HEAD}[lint]\nignore=[", ["'QR1',"] * MAX_BYTES, "]"),
    "roots": lambda: _filled(f"{HEAD}[fx]\nroots=[", _numbered("'r%',"), "]"),
    "unicode": lambda: f"name = '{'🎉' * (MAX_BYTES // 4 - 20)}'\n",
    "decimal digits": lambda: "a = " + "9" * (MAX_BYTES - 4),
    "hexadecimal digits": lambda: "a = 0x" + "f" * (MAX_BYTES - 6),
    "many long numbers": lambda: _filled("a = [", ["9" * 4000 + ","] * MAX_BYTES, "]"),
    "dates": lambda: _filled("a = [", ["2020-01-01,"] * MAX_BYTES, "]"),
    "fraction": lambda: "a = 1." + "1" * (MAX_BYTES - 6),
    "underscores": lambda: "a = 1" + "_1" * (MAX_BYTES // 2 - 5),
    "exponents": lambda: "a = 1e" + "9" * (MAX_BYTES - 6),
}

_FULL = (
    *("short rules", "long rules", "header rules", "dotted rules", "types", "unknown types"),
    *("unknown functions", "undefined qconfigs", "tensors", "bad tensors", "bare tensors"),
    *("empty tensors", "bad qconfigs", "unused qconfigs", "short keys", "unknown keys"),
    *("argument keys", "bad patterns", "array of tensors", "numbers", "floats not finite"),
    *("quoted keys", "short keys under a deep header", "deep keys", "deep headers"),
    *("odd bases", "bases", "bad codes", "roots", "dates"),
)
"""Giants that are refused by their number of items alone: these come again without the excess."""


def _as_many_as_may_be(name: str) -> str:
    giant = GIANTS[name]()
    pieces = re.split("(?<=[\n,])", giant.removesuffix("]"))
    counts = accumulate(sum(map(piece.count, "=,[.")) for piece in pieces)
    kept = sum(1 for _ in takewhile(MAX_ITEMS.__ge__, counts))
    return "".join(pieces[:kept]) + ("]" if giant.endswith("]") else "")


GIANTS |= {f"{name}, as many as may be": partial(_as_many_as_may_be, name) for name in _FULL}
