"""Recipes of up to a megabyte, each as slow as its kind of text can be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import accumulate, islice, takewhile

from qrecipe.reading import MAX_BYTES, MAX_ITEMS

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

GIANTS: dict[str, str] = {
    "short keys": _filled("", _numbered("k%=1\n")),
    "unknown keys": _filled(HEAD, _numbered("unknown% = 1\n")),
    "short rules": _rules("module_name", "k%='float'\n"),
    "long rules": _rules("module_name", "layer%={qconfig='float',expect=1,reason='why'}\n"),
    "header rules": _filled(HEAD, _numbered("[rules.module_name.k%]\nqconfig='float'\n")),
    "dotted rules": _filled(HEAD, _numbered("rules.module_name.k%.qconfig='float'\n")),
    "patterns": _rules("module_name", f"'{'*a' * 245}%'='float'\n"),
    "braces": _rules("module_name", "'{" + "a,*b,?c," * 60 + "%}'='float'\n"),
    "classes": _rules("module_name", f"'[{'a-z' * 160}]%'='float'\n"),
    "bad patterns": _rules("module_name", "'{%'='float'\n"),
    "types": _rules("module_type", "'a.B%'='float'\n"),
    "unknown types": _rules("module_type", "'torch.nn.Linea%'='float'\n"),
    "unknown functions": _rules("function", "'torch.matmul%'='float'\n"),
    "undefined qconfigs": _rules("module_name", "k%='q%'\n"),
    "tensors": _filled(HEAD, _numbered(f"[tensor.t%]\n{_TENSOR}")),
    "bad tensors": _filled(HEAD, _numbered("[tensor.t%]\nobserver='minmaxx'\n")),
    "bare tensors": _filled(HEAD, _numbered("[tensor.t%]\nreduce_range=true\n")),
    "empty tensors": _filled(HEAD, _numbered("[tensor.t%]\n")),
    "bad qconfigs": _filled(HEAD, _numbered("[qconfig.q%]\nweight='x%'\n")),
    "rules and qconfigs": _first(5_000, _rules("module_name", "k%='q%'\n"))
    + _first(5_000, _filled("[qconfig]\n", _numbered("q%={weight='t'}\n")))
    + f"[tensor.t]\n{_TENSOR}",
    "unused qconfigs": _filled(
        f"{HEAD}[tensor.t]\n{_TENSOR}[qconfig]\n", _numbered("q%={weight='t'}\n")
    ),
    "unused tensors of many qconfigs": _first(
        2_000,
        _filled(
            f"{HEAD}[tensor]\n",
            _numbered("t%={observer='minmax',dtype='int8',qscheme='per_tensor_affine'}\n"),
        ),
    )
    + _first(4_000, _filled("[qconfig]\n", _numbered("q%={weight='t%'}\n"))),
    "one line": _filled(_LINE, _numbered("k%='float',"), "z='float'}}"),
    "one line to clean": _filled(
        f"{_LINE}'\u202e'='float',", _numbered("k%='float',"), "z='float'}}"
    ),
    "one long line": _filled(
        f"{_LINE}'\u202e'={{qconfig='float',reason='{'x' * 900_000}'}},",
        islice(_numbered("k%='float',"), 9_000),
        "z='float'}}",
    ),
    "one line of mistakes": _filled("x={", _numbered("k%=nan,"), "z=1}"),
    "numbers": _filled("name = [", ["1,"] * MAX_BYTES, "]"),
    "floats not finite": _filled("name = [", ["nan,"] * MAX_BYTES, "]"),
    "arguments": _filled(
        f"{HEAD}[tensor.t.observer]\nname = 'minmax'\nx = [", ["1,"] * MAX_BYTES, "]"
    ),
    "argument keys": _filled(f"{HEAD}[tensor.t.observer]\nname = 'minmax'\n", _numbered("k%=1\n")),
    "empty arrays": _filled("name = [", ["[],"] * MAX_BYTES, "]"),
    "empty tables": _filled("name = [", ["{},"] * MAX_BYTES, "]"),
    "arrays of tables": _filled("", ["[[a]]\n"] * MAX_BYTES),
    "array of tensors": _filled("", _numbered("[[tensor.t%]]\n")),
    "deep headers": _filled("", _numbered(f"[{_DEEP}.k%]\n")),
    "deep keys": _filled("", _numbered(f"{_DEEP}.k%=1\n")),
    "short keys under a deep header": _filled(f"[{_DEEP}]\n", _numbered("k%=1\n")),
    "too deep header": _filled("[" + ".".join(["a"] * 990) + "]\n", _numbered("k%=1\n")),
    "too deep keys": _filled("", _numbered(".".join(["a"] * 900) + ".k%=1\n")),
    "dots": "a" + ".a" * (MAX_BYTES // 2 - 5) + "=1",
    "brackets": "a=" + "[" * (MAX_BYTES - 2),
    "nested arrays": _filled("name = [", ["[" * 90 + "]" * 90 + ","] * MAX_BYTES, "]"),
    "quoted keys": _filled("", _numbered('"\\u0061%"=1\n')),
    "repeated key at the end": _filled("", _numbered("k%=1\n"), "k0=1\n"),
    "repeated header": _filled("", _numbered("[k%]\n"), "[k0]\n"),
    "syntax error at the end": _filled("", _numbered("k%=1\n"), "?"),
    "open string": 'a = """' + '\\n"' * 300_000,
    "quotes": "a = ''" + "'" * (MAX_BYTES - 6),
    "escapes": 'a = "' + "\\n" * (MAX_BYTES // 2 - 4) + '"',
    "comments": _filled("", ["#\n"] * MAX_BYTES),
    "one comment": "#" * MAX_BYTES,
    "blank lines": "\n" * MAX_BYTES,
    "spaces": " " * MAX_BYTES,
    "carriage returns": "\r\n" * (MAX_BYTES // 2),
    "long key": f"{'k' * (MAX_BYTES - 4)} =1",
    "long string": f"name = '{'x' * (MAX_BYTES - 20)}'\n",
    "long pattern": f"{HEAD}[rules.module_name]\n'{'*a' * (MAX_BYTES // 2 - 80)}'='float'\n",
    "long type": f"{HEAD}[rules.module_type]\n'{'torch.' * (MAX_BYTES // 6 - 80)}x'='float'\n",
    "long qconfig": f"format=1\nbackend='x86'\nrules.global='{'q' * (MAX_BYTES - 80)}'\n",
    "long backend": f"backend='{'q' * (MAX_BYTES - 80)}'\n",
    "long reference": f"extends='./{'q/' * (MAX_BYTES // 2 - 80)}a.toml'\n",
    "parents": f"extends='{'../' * (MAX_BYTES // 3 - 80)}a.toml'\n",
    "bases": _filled("extends=[", _numbered("'./%.toml',"), "]"),
    "same bases": _filled("extends=[", ["'builtin:x86-static',"] * MAX_BYTES, "]"),
    "bases that are tables": _filled("extends=[", _numbered("{recipe='./%.toml',x=1},"), "]"),
    "odd bases": _filled("extends=[", ["1,"] * MAX_BYTES, "]"),
    "ignored codes": _filled(f"{HEAD}[lint]\nignore=[", ["'QR214',"] * MAX_BYTES, "]"),
    "bad codes": _filled(f"{HEAD}[lint]\nignore=[", ["'QR1',"] * MAX_BYTES, "]"),
    "roots": _filled(f"{HEAD}[fx]\nroots=[", _numbered("'r%',"), "]"),
    "unicode": f"name = '{'🎉' * (MAX_BYTES // 4 - 20)}'\n",
    "decimal digits": "a = " + "9" * (MAX_BYTES - 4),
    "hexadecimal digits": "a = 0x" + "f" * (MAX_BYTES - 6),
    "many long numbers": _filled("a = [", ["9" * 4000 + ","] * MAX_BYTES, "]"),
    "dates": _filled("a = [", ["2020-01-01,"] * MAX_BYTES, "]"),
    "fraction": "a = 1." + "1" * (MAX_BYTES - 6),
    "underscores": "a = 1" + "_1" * (MAX_BYTES // 2 - 5),
    "exponents": "a = 1e" + "9" * (MAX_BYTES - 6),
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


def _as_many_as_may_be(giant: str) -> str:
    pieces = re.split("(?<=[\n,])", giant.removesuffix("]"))
    counts = accumulate(sum(map(piece.count, "=,[.")) for piece in pieces)
    kept = sum(1 for _ in takewhile(MAX_ITEMS.__ge__, counts))
    return "".join(pieces[:kept]) + ("]" if giant.endswith("]") else "")


GIANTS |= {f"{name}, as many as may be": _as_many_as_may_be(GIANTS[name]) for name in _FULL}
