"""Name patterns, matched against whole names in linear time.

===========  =====================================================================
``*``        any characters within a name part (never across ``.``, ``:``, ``#``)
``?``        one such character
``**``       any characters across dots (never across ``:``, ``#``); as a whole part,
             zero or more parts: ``layer1.**.conv1`` matches ``layer1.conv1`` too
``[12]``     one of these characters; ``[1-3]`` is a range, ``[*]`` a literal star
``{a,b}``    one of these alternatives
===========  =====================================================================

A name that contains such a character is written with one-character classes: ``a[[]0[]]`` is the
name ``a[0]``, and exact.

A rule also covers everything inside what it matches, so a trailing ``.**`` is dropped.

A pattern becomes a nondeterministic automaton whose set of states is an integer. Steps are cached:
matching takes one look-up per character, and a hostile pattern cannot blow up.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from qrecipe.errors.findings import Finding, SchemaError
from qrecipe.errors.text import quoted_whole, shown

MAX_PATTERN_LENGTH = 500
SEPARATORS = frozenset(".:#")

_SPECIAL = frozenset("*?[]{}")
_ESCAPED = re.compile(r"\[([*?\[\]{}])\]")
_CALL_NUMBER = re.compile(r"[0-9*?{},\[\]-]+")

_Accepts = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class NamePattern:
    """A compiled pattern; equal texts give equal patterns.

    ``is_exact`` means that it can match only one name.
    """

    text: str
    is_exact: bool
    _accepts: _Accepts = field(compare=False, repr=False)

    def matches(self, name: str) -> bool:
        """Whether the whole name matches."""
        return self._accepts(name)


def compile_pattern(text: str) -> NamePattern:
    """Compile ``text``; a trailing ``.**`` is dropped.

    Raises SchemaError (QR110) if it is not a pattern.
    """
    if len(text) > MAX_PATTERN_LENGTH:
        raise _problem(f"a name pattern has at most {MAX_PATTERN_LENGTH} characters")
    kept = text
    while kept.endswith(".**"):
        kept = kept[: -len(".**")]
    if kept == "**":
        raise _problem(f"the pattern {shown(text)} matches everything", "use rules.global for that")
    _check_parts(kept)
    if is_exact(kept):
        return NamePattern(text, True, _ESCAPED.sub(r"\1", kept).__eq__)
    return NamePattern(text, False, _Builder(kept).build().accepts)


def is_exact(text: str) -> bool:
    """Whether a pattern can match only one name."""
    return _SPECIAL.isdisjoint(_ESCAPED.sub("", text))


def literal(name: str) -> str:
    """The pattern that matches only this name."""
    return "".join(f"[{each}]" if each in _SPECIAL else each for each in name)


def leave_float(name: str) -> str:
    """The hint to leave a site or module float, with the rule to write."""
    return f'leave it float: [rules.module_name] {quoted_whole(literal(name))} = "float"'


def selects(pattern: NamePattern, name: str) -> bool:
    """Whether a rule with that pattern selects the site of that name.

    The second call of a module is ``layer1.relu#1``, the first one has no number. A pattern
    without ``#`` selects all calls, ``#0`` the first, ``#1`` the second.
    """
    path, _, call = name.partition("#")
    if "#" in pattern.text:
        return pattern.matches(f"{path}#{call or 0}")
    return pattern.matches(path)


def _check_parts(text: str) -> None:
    """Reject patterns that cannot match any name."""
    site, hash_, call = text.partition("#")
    path, colon, family = site.partition(":")
    is_root_call = colon and not path
    if not is_root_call and "" in path.split("."):
        raise _problem(f"the name {shown(text)} has an empty part" if text else "the name is empty")
    if (colon and not family) or ":" in family:
        raise _problem(
            f"{shown(text)} does not name a call",
            'a call is "path:family", for example "layer1.0:add"',
        )
    if hash_ and not _CALL_NUMBER.fullmatch(call):
        raise _problem(
            f'{shown(text)} needs the number of a call after "#"', "the first call is #0"
        )


def _problem(message: str, hint: str | None = None) -> SchemaError:
    return SchemaError(Finding("QR110", message, hint=hint))


class _Automaton:
    """States are bits; ``_edges[i]`` has the transitions of state i: character test, target set."""

    __slots__ = ("_accepting", "_edges", "_start", "_steps")

    def __init__(self, edges: list[list[tuple[_Accepts, int]]], start: int, accepting: int) -> None:
        self._edges = edges
        self._start = start
        self._accepting = accepting
        self._steps: dict[tuple[int, str], int] = {}

    def accepts(self, name: str) -> bool:
        states = self._start
        for character in name:
            step = (states, character)
            if step not in self._steps:
                self._steps[step] = self._follow(states, character)
            states = self._steps[step]
            if not states:
                return False
        return bool(states & self._accepting)

    def _follow(self, states: int, character: str) -> int:
        reached = 0
        while states:
            lowest = states & -states
            states ^= lowest
            for accepts, targets in self._edges[lowest.bit_length() - 1]:
                if accepts(character):
                    reached |= targets
        return reached


class _Builder:
    """Compiles a pattern from left to right; every method continues from ``self._state``."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._edges: list[list[tuple[_Accepts, int]]] = [[]]
        self._silent: list[list[int]] = [[]]
        self._state = 0

    def build(self) -> _Automaton:
        while self._position < len(self._text):
            self._token(in_braces=False)
        closures = self._closures()
        edges = [[(accepts, closures[to]) for accepts, to in row] for row in self._edges]
        return _Automaton(edges, closures[0], 1 << self._state)

    def _token(self, *, in_braces: bool) -> None:
        rest = self._text[self._position :]
        if rest.startswith("**"):
            self._deep(in_braces=in_braces)
        elif rest.startswith(".**") and rest[3:4] in (":", "#"):
            self._deep_suffix()
        elif rest[0] == "*":
            self._position += 1
            self._loop(_within_part)
        elif rest[0] == "[":
            self._class()
        elif rest[0] == "{" and not in_braces:
            self._alternatives()
        elif rest[0] in "{}]":
            raise self._unbalanced()
        else:
            self._position += 1
            self._step(_within_part if rest[0] == "?" else rest[0].__eq__)

    def _deep(self, *, in_braces: bool) -> None:
        before, after = self._text[: self._position], self._text[self._position + 2 :]
        if in_braces or before.endswith("*") or after.startswith("*"):
            raise _problem(f'{shown(self._text)} has "**" in the wrong place', 'write "*" or "**"')
        self._position += 2
        is_part = (not before or before.endswith(".")) and after.startswith(".")
        if not is_part:
            self._loop(_across_dots)
            return
        self._position += 1
        start = self._state
        self._step(_across_dots)
        self._loop(_across_dots)
        self._step(".".__eq__)
        self._skip_from(start)

    def _deep_suffix(self) -> None:
        """``.**`` before a call: the module before it, or any module inside."""
        self._position += len(".**")
        start = self._state
        self._step(".".__eq__)
        self._step(_across_dots)
        self._loop(_across_dots)
        self._skip_from(start)

    def _class(self) -> None:
        end = self._text.find("]", self._position + 2)
        if end < 0:
            raise self._unbalanced()
        content = self._text[self._position + 1 : end]
        if content[0] in "!^" and len(content) > 1:
            raise _problem(
                f"{shown(f'[{content}]')} cannot be negated", "list the characters that may match"
            )
        if not SEPARATORS.isdisjoint(content):
            raise _problem(f'{shown(f"[{content}]")} cannot contain a separator (".", ":" or "#")')
        ranges = re.findall("(.)-(.)", content, re.DOTALL)
        if any(first > last for first, last in ranges):
            raise _problem(f"{shown(f'[{content}]')} has a range that runs backwards")
        characters = frozenset(re.sub("(.)-(.)", "", content, flags=re.DOTALL))
        self._position = end + 1
        self._step(partial(_in_class, characters, ranges))

    def _alternatives(self) -> None:
        start, ends = self._state, list[int]()
        at = ","
        while at == ",":
            self._state = self._add_state()
            self._silent[start].append(self._state)
            first = self._position = self._position + 1
            while self._text[self._position : self._position + 1] not in (",", "}", ""):
                self._token(in_braces=True)
            if self._position == first:
                raise _problem(f"{shown(self._text)} has an empty alternative in braces")
            ends.append(self._state)
            at = self._text[self._position : self._position + 1]
        if at != "}":
            raise self._unbalanced()
        self._position += 1
        self._state = self._add_state()
        for end in ends:
            self._silent[end].append(self._state)

    def _step(self, accepts: _Accepts) -> None:
        target = self._add_state()
        self._edges[self._state].append((accepts, target))
        self._state = target

    def _loop(self, accepts: _Accepts) -> None:
        target = self._add_state()
        self._silent[self._state].append(target)
        self._edges[target].append((accepts, target))
        self._state = target

    def _skip_from(self, start: int) -> None:
        target = self._add_state()
        self._silent[self._state].append(target)
        self._silent[start].append(target)
        self._state = target

    def _add_state(self) -> int:
        self._edges.append([])
        self._silent.append([])
        return len(self._edges) - 1

    def _closures(self) -> list[int]:
        """For each state, the states reached from it without reading a character."""
        closures = [0] * len(self._silent)
        for state in reversed(range(len(self._silent))):
            closures[state] = 1 << state
            for target in self._silent[state]:
                closures[state] |= closures[target]
        return closures

    def _unbalanced(self) -> SchemaError:
        return _problem(
            f"{shown(self._text)} has an unbalanced bracket or brace",
            'they come in pairs: "layer[12]", "{conv,fc}"',
        )


def _in_class(characters: frozenset[str], ranges: list[tuple[str, str]], character: str) -> bool:
    listed = character in characters or any(first <= character <= last for first, last in ranges)
    return listed and character not in SEPARATORS


def _within_part(character: str) -> bool:
    return character not in SEPARATORS


def _across_dots(character: str) -> bool:
    return character not in ":#"
