"""How much work a call is: executed bytecode instructions, which no busy machine changes."""

from __future__ import annotations

import sys


def work(function):
    """The number of instructions that a call executes in Python, and what it returns or raises."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "opcode":
            count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def growth(function, size):
    """How much more work twice the size is: 2 is linear, 4 quadratic."""
    function(4)  # imports, and what is cached once
    return work(lambda: function(2 * size)) / work(lambda: function(size))
