"""Text of any characters, for hypothesis.

Its own ``st.text()`` sorts and encodes all of Unicode first, which takes seconds in a new clone.
"""

from __future__ import annotations

from hypothesis import strategies as st

_SURROGATES = range(0xD800, 0xE000)
_CHARACTERS = st.one_of(
    st.integers(ord(" "), ord("~")), st.integers(0, 0x2FF), st.integers(0, 0x10FFFF)
).map(lambda code: chr(code if code not in _SURROGATES else code - _SURROGATES.start))


def any_text(min_size: int = 0, max_size: int | None = None) -> st.SearchStrategy[str]:
    return st.text(_CHARACTERS, min_size=min_size, max_size=max_size)
