"""How much work a call is, in units that no busy machine changes."""

from __future__ import annotations

import sys

import qrecipe

PACKAGE = qrecipe.__path__[0]


def work(function):
    """The lines that a call executes in qrecipe, with each turn of a loop, and all its calls."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        count += 1
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def growth(function, size):
    """How many times more work twice the size is: 2 is linear, 4 quadratic."""
    function(4)  # imports, and what is cached once
    return work(lambda: function(2 * size)) / work(lambda: function(size))
