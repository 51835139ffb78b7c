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

The globs of a recipe become nondeterministic automata, one for each thousand characters, whose sets
of states are integers. Steps are cached: matching all globs takes one look-up per character and
automaton, and a hostile pattern cannot blow up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from operator import or_
from typing import TypeAlias

from qrecipe.errors.findings import SchemaError
from qrecipe.errors.text import quoted_whole, shown

MAX_PATTERN_LENGTH = 500
_GROUPED = 1_000
"""The most characters of the patterns that share an automaton: a set of states stays small."""
_MOST_STEPS = 10_000
SEPARATORS = frozenset(".:#")

_SPECIAL = frozenset("*?[]{}")
_ESCAPED = re.compile(r"\[([*?\[\]{}])\]")
_CALL_NUMBER = re.compile(r"[0-9*?{},\[\]-]+")

_Accepts = Callable[[str], bool]


class NamePatterns:
    """Several patterns, matched together; they are known by their position."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Raises SchemaError (QR110) if one of them is not a pattern."""
        self._exact: dict[str, list[int]] = {}
        self._numbered = {index for index, text in enumerate(texts) if "#" in text}
        groups: list[dict[int, Sequence[_Item]]] = []
        room = 0
        for index, text in enumerate(texts):
            kept = _checked(text)
            if is_exact(kept):
                self._exact.setdefault(_ESCAPED.sub(r"\1", kept), []).append(index)
                continue
            if len(text) > room:
                groups.append({})
                room = _GROUPED
            groups[-1][index] = _Parser(kept).items
            room -= len(text)
        self._automata = list(map(_Automaton, groups))

    def matching(self, name: str) -> list[int]:
        """The patterns that match a whole name."""
        found = self._exact.get(name, [])
        return [*found, *(index for each in self._automata for index in each.accepting(name))]

    def selecting(self, name: str) -> list[int]:
        """The patterns of the rules that select the site of that name.

        The second call of a module is ``layer1.relu#1``, the first one has no number. A pattern
        without ``#`` selects all calls, ``#0`` the first, ``#1`` the second.
        """
        path, _, call = name.partition("#")
        found = [index for index in self.matching(path) if index not in self._numbered]
        if self._numbered:
            found += self._numbered.intersection(self.matching(f"{path}#{call or 0}"))
        return found


def check_pattern(text: str) -> None:
    """Raises SchemaError (QR110) if a text is not a pattern."""
    kept = _checked(text)
    if not is_exact(kept):
        _Parser(kept)


def _checked(text: str) -> str:
    """The pattern without trailing ``.**``, which could match a name."""
    if len(text) > MAX_PATTERN_LENGTH:
        raise _problem(f"a name pattern has at most {MAX_PATTERN_LENGTH} characters")
    kept = _kept(text)
    if kept == "**":
        raise _problem(f"the pattern {shown(text)} matches everything", "use rules.global for that")
    _check_parts(kept)
    return kept


def _kept(text: str) -> str:
    while text.endswith(".**"):
        text = text[: -len(".**")]
    return text


def is_exact(text: str) -> bool:
    """Whether a pattern can match only one name."""
    return _SPECIAL.isdisjoint(_ESCAPED.sub("", _kept(text)))


def literal(name: str) -> str:
    """The pattern that matches only this name."""
    return "".join(f"[{each}]" if each in _SPECIAL else each for each in name)


def leave_float(name: str) -> str:
    """The hint to leave a site or module float, with the rule to write."""
    return f'leave it float: [rules.module_name] {quoted_whole(literal(name))} = "float"'


def _check_parts(text: str) -> None:
    """Reject patterns that cannot match any name."""
    site, hash_, call = text.partition("#")
    path, colon, family = site.partition(":")
    is_root_call = colon and not path
    if not is_root_call and "" in path.split("."):
        raise _problem(f"the name {shown(text)} has an empty part" if text else "the name is empty")
    if (colon and not family) or ":" in family:
        hint = 'a call is "path:family", for example "layer1.0:add"'
        raise _problem(f"{shown(text)} does not name a call", hint)
    if hash_ and not _CALL_NUMBER.fullmatch(call):
        message = f'{shown(text)} needs the number of a call after "#"'
        raise _problem(message, "the first call is #0")


def _problem(message: str, hint: str | None = None) -> SchemaError:
    return SchemaError.of("QR110", message, hint=hint)


class _Automaton:
    """States are bits; a state is left by one kind of character, for a set of states.

    The first states accept, each for one of the patterns.
    """

    def __init__(self, patterns: Mapping[int, Sequence[_Item]]) -> None:
        self._patterns = list(patterns)
        self._states: list[tuple[_Accepts, int]] = [(_nothing, 0)] * len(patterns)
        starts = (self._before(each, 1 << end) for end, each in enumerate(patterns.values()))
        self._start = reduce(or_, starts)
        self._steps: dict[tuple[int, str], int] = {}

    def accepting(self, name: str) -> Iterator[int]:
        """The patterns that match a whole name."""
        states = self._start
        for character in name:
            step = (states, character)
            if step not in self._steps:
                if len(self._steps) >= _MOST_STEPS:
                    self._steps.clear()
                self._steps[step] = self._follow(states, character)
            states = self._steps[step]
            if not states:
                return
        for end, pattern in enumerate(self._patterns):
            if states >> end & 1:
                yield pattern

    def _follow(self, states: int, character: str) -> int:
        reached = 0
        while states:
            lowest = states & -states
            states ^= lowest
            accepts, targets = self._states[lowest.bit_length() - 1]
            if accepts(character):
                reached |= targets
        return reached

    def _before(self, items: Sequence[_Item], after: int) -> int:
        """The states from which the items lead to the states ``after``."""
        for item in reversed(items):
            if isinstance(item, _Any):
                after = reduce(or_, [self._before(branch, after) for branch in item.branches])
                continue
            state = 1 << len(self._states)
            if item.repeats:
                after |= state
            self._states.append((item.accepts, after))
            after = after if item.repeats else state
        return after


@dataclass(frozen=True, slots=True)
class _One:
    """One character, or any number of them."""

    accepts: _Accepts
    repeats: bool = False


@dataclass(frozen=True, slots=True)
class _Any:
    """One of several sequences."""

    branches: Sequence[Sequence[_Item]]


_Item: TypeAlias = "_One | _Any"


def _within_part(character: str) -> bool:
    return character not in SEPARATORS


def _across_dots(character: str) -> bool:
    return character not in ":#"


def _nothing(character: str) -> bool:
    return False


_DOT, _DEEP = _One(".".__eq__), (_One(_across_dots), _One(_across_dots, repeats=True))
_WILD: dict[str, _Item] = {
    "?": _One(_within_part),
    "*": _One(_within_part, repeats=True),
    "**": _One(_across_dots, repeats=True),
    "**.": _Any(((), (*_DEEP, _DOT))),  # as a whole part: modules around, if any
    ".**": _Any(((), (_DOT, *_DEEP))),  # before a call: the module, or any inside
}


@lru_cache(maxsize=1_000)
def _literal(character: str) -> _One:
    return _One(character.__eq__)


_TOKEN = re.compile(r"\.\*\*(?=[:#])|(?<![^.])\*\*\.|\*+|\[(?P<listed>.[^\]]*)\]|.", re.DOTALL)


class _Parser:
    """Reads a pattern from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(_TOKEN.finditer(text))[::-1]
        self.items = self._sequence("")
        if self._tokens:
            raise self._unbalanced()

    def _sequence(self, ends: str) -> list[_Item]:
        """The items up to one of the characters ``ends``, or to the end of the pattern."""
        items = []
        while self._tokens and self._tokens[-1].group() not in (*ends, "}"):
            items.append(self._item(self._tokens.pop(), in_braces=bool(ends)))
        return items

    def _item(self, token: re.Match[str], *, in_braces: bool) -> _Item:
        text = token.group()
        if token["listed"] is not None:
            return _One(self._listed(token["listed"]))
        if text == "{" and not in_braces:
            return self._alternatives()
        if text in ("[", "]", "{"):
            raise self._unbalanced()
        if text.startswith("*") and len(text) > 1 and (in_braces or text.startswith("***")):
            raise _problem(f'{shown(self._text)} has "**" in the wrong place', 'write "*" or "**"')
        return _WILD.get(text) or _literal(text)

    def _alternatives(self) -> _Any:
        branches: list[list[_Item]] = []
        while not branches or self._tokens.pop().group() == ",":
            branches.append(self._sequence(","))
            if not self._tokens and branches[-1]:
                raise self._unbalanced()
            if not branches[-1]:
                raise _problem(f"{shown(self._text)} has an empty alternative in braces")
        return _Any(branches)

    def _listed(self, content: str) -> _Accepts:
        written = shown(f"[{content}]")
        if content[0] in "!^" and len(content) > 1:
            raise _problem(f"{written} cannot be negated", "list the characters that may match")
        if not SEPARATORS.isdisjoint(content):
            raise _problem(f'{written} cannot contain a separator (".", ":" or "#")')
        ranges = re.findall("(.)-(.)", content, re.DOTALL)
        if any(first > last for first, last in ranges):
            raise _problem(f"{written} has a range that runs backwards")
        characters = frozenset(re.sub("(.)-(.)", "", content, flags=re.DOTALL))
        return partial(_in_class, characters, ranges)

    def _unbalanced(self) -> SchemaError:
        hint = 'they come in pairs: "layer[12]", "{conv,fc}"'
        return _problem(f"{shown(self._text)} has an unbalanced bracket or brace", hint)


def _in_class(characters: frozenset[str], ranges: list[tuple[str, str]], character: str) -> bool:
    listed = character in characters or any(first <= character <= last for first, last in ranges)
    return listed and character not in SEPARATORS
