"""The one dialect of name patterns, against a naive reference."""

from __future__ import annotations

import contextlib
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrecipe.errors.findings import SchemaError
from qrecipe.recipe.patterns import (
    MAX_PATTERN_LENGTH,
    NamePatterns,
    check_pattern,
    is_exact,
    literal,
)

# --- the reference: alternatives written out, then plain backtracking


def alternatives(pattern: str) -> list[str]:
    match = re.search(r"\{([^}]*)\}", pattern)
    if match is None:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [full for one in match[1].split(",") for full in alternatives(head + one + tail)]


def naive(pattern: str, name: str, at_start: bool = True) -> bool:
    if not pattern:
        return not name
    if pattern.startswith("**"):
        rest = pattern[2:]
        if at_start and rest.startswith("."):
            parts = name.split(":")[0].split("#")[0].split(".")
            return any(
                naive(rest[1:], name[len("".join(f"{part}." for part in parts[:count])) :])
                for count in range(len(parts))
            )
        return any(
            naive(rest, name[size:], False)
            for size in range(len(name) + 1)
            if not set(name[:size]) & set(":#")
        )
    if pattern.startswith(".**") and pattern[3:4] in (":", "#"):
        inside = name.startswith(".") and any(
            naive(pattern[3:], name[size:], False)
            for size in range(2, len(name) + 1)
            if not set(name[:size]) & set(":#")
        )
        return naive(pattern[3:], name, False) or inside
    if pattern[0] == "*":
        return any(
            naive(pattern[1:], name[size:], False)
            for size in range(len(name) + 1)
            if not set(name[:size]) & set(".:#")
        )
    if not name:
        return False
    if pattern[0] == "?":
        return name[0] not in ".:#" and naive(pattern[1:], name[1:], False)
    if pattern[0] == "[":
        end = pattern.index("]", 2)
        return name[0] in pattern[1:end] and naive(pattern[end + 1 :], name[1:], False)
    return pattern[0] == name[0] and naive(pattern[1:], name[1:], name[0] == ".")


def reference(pattern: str, name: str) -> bool:
    while pattern.endswith(".**"):
        pattern = pattern[:-3]
    return any(naive(one, name) for one in alternatives(pattern))


PART = st.sampled_from(
    ["a", "b", "ab", "*", "?", "a*", "*b", "[ab]", "[ab]*", "{a,b}", "{a,ab}b", "a**b", "{a.b,b*}"]
)
PATH = st.lists(PART | st.just("**"), min_size=1, max_size=4).map(".".join)
CALL = st.sampled_from(["", ":add", ":a*", ":{add,sub}", "#1", "#*", ":add#1", ":*#[01]"])
PATTERNS = st.builds(str.__add__, PATH, CALL).filter(
    lambda text: text.removesuffix(".**").replace("**.", "") != "**"
)
NAMES = st.builds(
    str.__add__,
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=4).map(".".join),
    st.sampled_from(["", ":add", ":sub", ":add#1", "#0", "#1"]),
)


def matches(pattern, name):
    return NamePatterns([pattern]).matching(name) == [0]


def selects(pattern, name):
    return NamePatterns([pattern]).selecting(name) == [0]


@given(PATTERNS, st.lists(NAMES, min_size=1, max_size=8))
def test_a_pattern_matches_what_the_naive_reference_matches(text, names):
    for name in names:
        assert matches(text, name) == reference(text, name), name


@given(st.lists(PATTERNS, max_size=12), st.lists(NAMES, min_size=1, max_size=8))
def test_patterns_that_are_matched_together_match_what_each_matches_alone(texts, names):
    together = NamePatterns(texts)
    numbered = [f"{name}#{number}" for number, name in enumerate(names)]
    for name in (*names, *numbered):
        assert sorted(together.matching(name)) == [
            index for index, text in enumerate(texts) if matches(text, name)
        ]
        assert sorted(together.selecting(name)) == [
            index for index, text in enumerate(texts) if selects(text, name)
        ]


@given(NAMES)
def test_a_name_is_a_pattern_that_matches_itself_only(name):
    assert is_exact(name)
    assert matches(name, name)
    assert not matches(name, f"{name}x")
    assert not matches(name, name[1:])


ODD_NAMES = st.text("ab*?[]{},-!^", min_size=1, max_size=12)


@given(ODD_NAMES, st.lists(ODD_NAMES, max_size=8))
def test_a_name_with_letters_of_patterns_has_an_exact_pattern_that_matches_it_alone(name, others):
    pattern = literal(name)
    assert is_exact(pattern)
    assert matches(pattern, name)
    assert [other for other in others if matches(pattern, other)] == [
        other for other in others if other == name
    ]
    assert selects(f"{pattern}#0", name)
    assert not selects(f"{pattern}#0", f"{name}#1")


def test_a_class_of_one_plain_letter_or_of_several_is_no_exact_name():
    assert is_exact("conv[[]1[]]")
    assert not is_exact("conv[1]")
    assert not is_exact("conv[*?]")
    assert not is_exact("conv[*]*")


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("layer*", "layer1", "layer1.0"),
        ("layer4.*.conv[12]", "layer4.0.conv2", "layer4.0.conv3"),
        ("layer4.*.conv[12]", "layer4.1.conv1", "layer4.0.1.conv1"),
        ("a.**.b", "a.b", "ab"),
        ("a.**.b", "a.x.y.b", "a.x.yb"),
        ("**.relu", "relu", "prelu"),
        ("**.relu", "layer1.0.relu", "layer1.0.relu.x"),
        ("layer**", "layer1.0.conv", "head.layer1"),
        ("layer4.**", "layer4", "layer4.0"),
        ("**:add", "layer1.0:add", "layer1.0:sub"),
        ("**:add", ":add", "add"),
        ("layer1.**:add", "layer1:add", "layer10:add"),
        ("layer1.**:add", "layer1.0.1:add", "layer1.0.1:add#1"),
        ("layer1*:add", "layer1:add", "layer1.0:add"),
        ("conv[1-3]", "conv2", "conv4"),
        ("conv[-1]", "conv-", "conv0"),
        ("odd[*]", "odd*", "oddly"),
        ("odd[]]", "odd]", "odd["),
        ("{layer1,layer2.0}.conv", "layer2.0.conv", "layer2.conv"),
        (":flatten", ":flatten", "flatten"),
        ("größe?", "größe1", "größe.1"),
    ],
)
def test_the_dialect_by_example(pattern, matching, other):
    assert matches(pattern, matching)
    assert not matches(pattern, other)


def test_a_trailing_deep_star_is_dropped_and_leaves_an_exact_name():
    assert is_exact("layer4.**")
    assert matches("layer4.**.**", "layer4")
    assert not is_exact("layer4.*")


@pytest.mark.parametrize(
    ("pattern", "site", "expected"),
    [
        ("layer1.0:add", "layer1.0:add", True),
        ("layer1.0:add", "layer1.0:add#1", True),
        ("layer1.0:add#0", "layer1.0:add", True),
        ("layer1.0:add#0", "layer1.0:add#1", False),
        ("layer1.0:add#1", "layer1.0:add#1", True),
        ("layer1.0:add#1", "layer1.0:add#10", False),
        ("layer1.0:add#*", "layer1.0:add", True),
        ("**.relu", "layer1.0.relu#1", True),
        ("layer1.0.relu#0", "layer1.0.relu", True),
        ("layer1.0.relu#[12]", "layer1.0.relu", False),
        ("layer1.0.relu#[12]", "layer1.0.relu#2", True),
    ],
)
def test_a_rule_selects_all_calls_or_the_numbered_one(pattern, site, expected):
    assert selects(pattern, site) is expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "is empty"),
        ("a..b", "an empty part"),
        (".a", "an empty part"),
        ("a.", "an empty part"),
        ("a[12", "unbalanced"),
        ("a]", "unbalanced"),
        ("a{b", "unbalanced"),
        ("a{b,c", "unbalanced"),
        ("a}b", "unbalanced"),
        ("{a,{b,c}}", "unbalanced"),
        ("a[]", "unbalanced"),
        ("{a,}", "empty alternative"),
        ("[!a]", "cannot be negated"),
        ("[a.]", "separator"),
        ("[9-1]", "backwards"),
        ("a***b", "wrong place"),
        ("{**,a}.b", "wrong place"),
        ("**", "matches everything"),
        ("**.**", "matches everything"),
        ("a:", "does not name a call"),
        ("a:b:c", "does not name a call"),
        ("a:add#first", "the number of a call"),
        ("a#", "the number of a call"),
        ("a" * (MAX_PATTERN_LENGTH + 1), "at most"),
    ],
)
def test_what_is_no_pattern_is_a_finding(pattern, message):
    with pytest.raises(SchemaError, match=message) as caught:
        check_pattern(pattern)
    assert [finding.code for finding in caught.value.findings] == ["QR110"]


def test_the_bare_deep_star_names_the_global_rule():
    with pytest.raises(SchemaError, match=r"rules\.global"):
        check_pattern("**")


@given(st.text("ab.*?[]{},:#-!", max_size=30))
def test_any_text_is_a_pattern_or_a_finding(text):
    with contextlib.suppress(SchemaError):
        assert NamePatterns([text]).matching("a.b:add#1") in ([], [0])


@pytest.mark.parametrize("unit", ["*a", "**.", "?*", "a**b**", "{a,b}*", "[\x01-\U0010ffff]*"])
def test_a_hostile_pattern_takes_no_more_than_linear_time(unit):
    pattern = unit * ((MAX_PATTERN_LENGTH - 1) // len(unit)) + "x"
    started = time.process_time()
    for name in ("a" * 2_000, "a." * 1_000 + "b", "ab" * 1_000):
        assert not matches(pattern, name)
    assert time.process_time() - started < 5
