"""Hostile recipes, references, globs and lock files, each made from one source of randomness.

The quick suite (`test_hostile.py`) draws some of it, `tools/fuzz.py` as much as time allows.
"""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NoReturn

from giants import GIANTS
from places import ROOT

import qrecipe
from qrecipe.authoring.lock.file import read_lock
from qrecipe.errors.findings import QRecipeError
from qrecipe.recipe.patterns import NamePatterns, is_exact

RECIPES = ROOT / "recipes"
SEEDS = tuple(path.read_text(encoding="utf-8") for path in sorted(RECIPES.glob("*.toml")))
SECRET = "secret_outside_of_the_tree"

ODD_TEXTS = (
    *("", " ", "\0", "\x1b[2J", "\u202e", "\ufeff", "\ud800", "🎉" * 50, "e\u0301", "ﬀ", "İ"),
    *("x" * 5_000, "." * 300, "*" * 300, "{" * 50, "[" * 50, "**", "a.**", "**.**", "{a,b}" * 40),
    *("__import__('os').system('true')", "os.system", "builtins.eval", "/etc/passwd", "%s%n"),
    *("float", "inherit", "int8", "minmax", "global", "torch.nn.Linear", "torch.add", "../x", "#"),
    *("builtin:x86-static", "./a.toml", "QR214", "-", "'", '"', "\\", "\n", "]]", "= 1"),
)
ODD_VALUES = (
    *("nan", "-inf", "inf", "1e999", "-0.0", "9" * 30, "9" * 5_000, "0x" + "f" * 40, "-1", "0"),
    *("true", "1979-05-27", "07:32:00", "[]", "{}", "[[]]", "[{}]", "{a.b.c=1}", "'''a\nb'''"),
    *('"""\\"""', "[" * 99 + "]" * 99, "[" * 101 + "]" * 101, "{a=" * 101 + "1" + "}" * 101),
    *("'int8'", "'x86'", "1", "128", "255", "1.5", "nonsense", "'" + "x" * 3_000 + "'", "0o17"),
)
ODD_LINES = (
    *("[rules]", "[rules.module_name]", "[[tensor.a]]", "[[rules]]", "[a.b.c.d]", "[", "]", "[]"),
    *("[tensor.weight.observer]", "extends = 'builtin:x86-static'", "format = 2", "format = true"),
    *("extends = ['./a.toml', {recipe='./b.toml', sha256='" + "0" * 64 + "'}]", "#" * 2_000),
    *("[" + ".".join("a" * 200) + "]", ".".join("a" * 200) + " = 1", "\x00", "\t", "<<<<<<< HEAD"),
)
ODD_REFERENCES = (
    *("../a.toml", "../../../../../../etc/passwd", "/etc/passwd", "//host/share/a.toml"),
    *(r"\\server\share\a.toml", "C:\\a.toml", "c:a.toml", "C:/a.toml", "file:///etc/passwd"),
    *("file:a.toml", "http://localhost/a.toml", "~/a.toml", "~root/a.toml", "./\0", "./a\0.toml"),
    *("./" + "a" * 300, "./" + "a/" * 3_000 + "a.toml", "../" * 2_000, "builtin:../x", "builtin:"),
    *("builtin:nothing", "builtin:x86-static", "pip:x", "pydantic:main", "nothing-at-all:x", ""),
    *(".", "..", "./", "./.", "./..", "./.git", "./folder", "./pipe", "./a.toml/.", "./a.toml/b"),
    *(
        "./dangling",
        "./loop",
        "./out.toml",
        "./outside/secret.toml",
        "./up/secret.toml",
        "./A.TOML",
    ),
    *(
        "./%2e%2e/secret.toml",
        "./..\\secret.toml",
        "./a.toml ",
        "./\u2024\u2024/a.toml",
        "./\ud800",
    ),
    *("/proc/self/environ", "/dev/zero", "./zero", "qrecipe:x", "./big.toml", "./null.toml"),
)
ALPHABET = string.ascii_letters + string.digits + ".:#*?[]{},-_!^\\ é🎉\x00\n\t\"'"


@dataclass(frozen=True)
class Outcome:
    """What a case came to: how many files it read, and what was found in them."""

    files: int
    codes: tuple[str, ...]


def outcome(files: int, read: Callable[[], object]) -> Outcome:
    """Of reading something hostile. Any error but ours is a leak, and goes on."""
    try:
        read()
    except QRecipeError as error:
        said = str(error)
        said.encode()  # no half characters
        assert SECRET not in said, "a file outside of the tree was read"
        json.dumps([finding.to_json() for finding in error.findings])
        codes = {finding.code for finding in error.findings}
        return Outcome(files, tuple(sorted(codes)) or _leak("an error without a finding"))
    return Outcome(files, ("accepted",))


def _leak(what: str) -> NoReturn:
    raise AssertionError(what)


# --- texts


def text(random: Random) -> str:
    kind = random.randrange(4)
    if kind == 0:
        return random.choice(ODD_TEXTS)
    if kind == 1:
        return "".join(random.choices(ALPHABET, k=random.randrange(40)))
    if kind == 2:
        return "".join(chr(random.randrange(0x110000)) for _ in range(random.randrange(8)))
    return random.choice(ODD_TEXTS)[:50] + random.choice(ODD_TEXTS)[:50]


def quoted(value: str) -> str:
    """A text as TOML writes it, mostly well."""
    return json.dumps(value.replace("\ud800", "\\ud800"), ensure_ascii=False).replace("\x7f", "")


def recipe_text(random: Random) -> str:
    """A shipped recipe after some mutations, or a giant."""
    if random.random() < 0.01:
        return random.choice(list(GIANTS.values()))()
    lines = random.choice(SEEDS).split("\n")
    for _ in range(random.choice((1, 1, 2, 3, 5, 10, 30))):
        random.choice(MUTATIONS)(random, lines)
        lines = lines or [""]
    return random.choice(("\n", "\n", "\n", "\r\n")).join(lines)


def _deleted(random: Random, lines: list[str]) -> None:
    del lines[random.randrange(len(lines))]


def _repeated(random: Random, lines: list[str]) -> None:
    line = random.choice(lines)
    for _ in range(random.choice((1, 1, 1, 50))):
        lines.insert(random.randrange(len(lines) + 1), line)


def _swapped(random: Random, lines: list[str]) -> None:
    one, other = random.randrange(len(lines)), random.randrange(len(lines))
    lines[one], lines[other] = lines[other], lines[one]


def _odd_line(random: Random, lines: list[str]) -> None:
    lines.insert(random.randrange(len(lines) + 1), random.choice(ODD_LINES))


def _other_value(random: Random, lines: list[str]) -> None:
    index = random.randrange(len(lines))
    key, equals, _ = lines[index].partition("=")
    if equals:
        value = random.choice((quoted(text(random)), random.choice(ODD_VALUES)))
        lines[index] = f"{key}= {value}"


def _other_key(random: Random, lines: list[str]) -> None:
    index = random.randrange(len(lines))
    _, equals, value = lines[index].partition("=")
    if equals:
        keys = [quoted(text(random)) for _ in range(random.choice((1, 1, 2, 5)))]
        lines[index] = f"{'.'.join(keys)} ={value}"


def _other_header(random: Random, lines: list[str]) -> None:
    name = random.choice(("tensor", "qconfig", "rules", "fx", "lint", quoted(text(random))))
    inner = random.choice(("", f".{quoted(text(random))}", ".weight", ".module_name"))
    lines.insert(
        random.randrange(len(lines) + 1), random.choice(("[{}]", "[[{}]]")).format(name + inner)
    )


def _rules(random: Random, lines: list[str]) -> None:
    tier = random.choice(("module_name", "module_type", "function", "global"))
    values = ("'float'", "'inherit'", "{weight='weight'}", "{expect=-1}", random.choice(ODD_VALUES))
    lines.append(f"[rules.{tier}]")
    lines += (
        f"{quoted(random.choice((pattern, text))(random))} = {random.choice(values)}"
        for _ in range(random.choice((1, 3, 100)))
    )


def _extended(random: Random, lines: list[str]) -> None:
    lines.insert(0, f"extends = {quoted(reference(random))}")


def _character(random: Random, lines: list[str]) -> None:
    index = random.randrange(len(lines))
    at = random.randrange(len(lines[index]) + 1)
    character = random.choice((chr(random.randrange(0x3000)), random.choice("[]{}=.,'\"#\\\r\0")))
    end = at + random.randrange(2)
    lines[index] = lines[index][:at] + character + lines[index][end:]


def _cut(random: Random, lines: list[str]) -> None:
    del lines[random.randrange(len(lines)) :]


MUTATIONS: tuple[Callable[[Random, list[str]], None], ...] = (
    *(_deleted, _repeated, _swapped, _odd_line, _other_value, _other_value, _other_key),
    *(_other_header, _rules, _extended, _character, _character, _cut),
)


def recipe_case(random: Random, folder: Path) -> Outcome:
    content = recipe_text(random)
    if random.random() < 0.5:
        return outcome(1, lambda: _used(qrecipe.parse_recipe(content)))
    path = folder / "alone" / "recipe.toml"
    path.parent.mkdir(exist_ok=True)
    data = bytearray(content.encode("utf-8", "surrogatepass") or b"x")
    for _ in range(random.choice((0, 0, 0, 1, 5))):
        data[random.randrange(len(data)) : random.randrange(len(data) + 1)] = random.randbytes(2)
        data = data or bytearray(b"x")
    path.write_bytes(data)
    return outcome(1, lambda: _used(qrecipe.load_recipe(path)))


def _used(recipe: qrecipe.Recipe) -> None:
    """What a sound recipe is used for without a model."""
    if len(recipe.rules) < 1_000:
        again = qrecipe.parse_recipe(recipe.to_toml())
        assert again.fingerprint == recipe.fingerprint, "written back it is another recipe"


# --- references

FILES = ("a.toml", "b.toml", "c.toml", "folder/d.toml", "folder/deep/e.toml")


def reference(random: Random) -> str:
    kind = random.randrange(5)
    if kind == 0:
        return random.choice(("./", "../", "./folder/", "../folder/")) + text(random)
    if kind == 1:
        steps = random.choices(
            ("..", ".", "folder", "up", "inside", "", "a.toml"), k=random.randrange(9)
        )
        return "./" + "/".join(steps)
    if kind == 2:
        return random.choice(("./", "../", "../../")) + random.choice(FILES)
    return random.choice(ODD_REFERENCES)


def plant(folder: Path) -> Path:
    """A tree with links of all kinds, and what lies outside of it; returns the tree."""
    tree = folder / "tree"
    (tree / "folder" / "deep").mkdir(parents=True)
    (tree / "pyproject.toml").touch()
    outside = folder / "outside"
    outside.mkdir()
    for place in (folder / "secret.toml", outside / "secret.toml"):
        place.write_text(f'format = 1\nname = "{SECRET}"\n{SECRET}\n')
    links = {
        "out.toml": "../secret.toml",
        "outside": str(outside),
        "up": "..",
        "folder/up": "../..",
        "inside": "folder",
        "loop": "loop",
        "circle": "circle2",
        "circle2": "circle",
        "dangling": "nowhere",
        "zero": "/dev/zero",
        "passwd": "/etc/passwd",
        "link.toml": "a.toml",
    }
    for name, target in links.items():
        (tree / name).symlink_to(target)
    os.mkfifo(tree / "pipe")
    (tree / "null.toml").write_bytes(b"format = 1\0")
    (tree / "big.toml").write_bytes(b"#" * (2**20 + 1))
    return tree


LINKS = ("link.toml", "out.toml", "inside/d.toml", "up/secret.toml", "outside/secret.toml")


def reference_case(random: Random, folder: Path) -> Outcome:
    """A small tree of recipes that extend each other and more."""
    tree = folder / "tree"
    if not tree.exists():
        plant(folder)
    for name in FILES:
        (tree / name).write_text(extending(random), encoding="utf-8", errors="surrogatepass")
    top = tree / random.choice(FILES)
    return outcome(len(FILES), lambda: _confined(qrecipe.load_recipe(top)))


def extending(random: Random) -> str:
    references = [
        random.choice((reference, lambda r: "./" + r.choice((*FILES, *LINKS))))(random)
        for _ in range(random.choice((0, 1, 1, 2, 3, 40)))
    ]
    written = [quoted(each) for each in references]
    if written and random.random() < 0.1:
        written[0] = f"{{ recipe = {written[0]}, sha256 = '{'0' * 64}' }}"
    values = [f"name = {quoted(text(random))}"] if random.random() < 0.3 else []
    rules = [f"{quoted(random.choice('abc'))} = 'float'", "z = 'inherit'"]
    return "\n".join(
        [
            "format = 1\nbackend = 'x86'",
            *values,
            f"extends = [{', '.join(written)}]",
            "[rules]\nglobal = 'float'\n[rules.module_name]",
            *random.sample(rules, random.randrange(2)),
        ]
    )


def _confined(recipe: qrecipe.Recipe) -> None:
    assert SECRET not in recipe.to_toml(), "a recipe outside of the tree was read"


# --- globs


def pattern(random: Random) -> str:
    pieces = (
        *(
            "*",
            "**",
            "?",
            ".",
            ".**",
            "**.",
            "{a,b}",
            "{a*,?b}",
            "[ab]",
            "[a-z]",
            "[*]",
            "layer",
            "a",
        ),
        *(
            "1",
            ":",
            "#",
            ":add",
            "#1",
            "#*",
            "{",
            "}",
            "[",
            "]",
            ",",
            "-",
            "!",
            "\\",
            "é",
            "🎉",
            "\0",
        ),
    )
    return "".join(random.choices(pieces, k=random.choice((1, 2, 4, 8, 30, 200, 600))))


def site_name(random: Random) -> str:
    parts = random.choices(
        ("layer1", "0", "conv", "a", "b", "", "é"), k=random.choice((1, 2, 3, 60))
    )
    call = random.choice(("", "", ":add", ":", "#1", ":add#1", "#"))
    return random.choice((".", ".", "")).join(parts) + call + random.choice(("", "a" * 2_000))


def pattern_case(random: Random, folder: Path) -> Outcome:
    """One pattern against fifty names, some of them twice."""
    written = random.choice((pattern, text))(random)
    names = [site_name(random) for _ in range(50)]

    def match() -> None:
        patterns = NamePatterns([written])
        verdicts = list(map(patterns.selecting, names))
        assert verdicts == list(map(patterns.selecting, names)), "a pattern that remembers"
        if is_exact(written) and not written.endswith(".**") and "#" not in written:
            name = re.sub(r"\[(.)\]", r"\1", written)  # one letter in brackets is that letter
            assert patterns.matching(name), "an exact name does not match itself"

    return outcome(1, match)


# --- lock files


def lock_case(random: Random, folder: Path, good: str) -> Outcome:
    lines = good.split("\n")
    for _ in range(random.choice((1, 1, 2, 5, 30))):
        random.choice(MUTATIONS)(random, lines)
        lines = lines or [""]
    content = "\n".join(lines)
    if random.random() < 0.005:
        content = random.choice(list(GIANTS.values()))()
    path = folder / "recipe.lock"
    path.write_text(content, encoding="utf-8", errors="surrogatepass", newline="")
    return outcome(1, lambda: read_lock(path))
