"""Where a quantized model runs: one recipe through every runtime that is installed.

May import `measure` and below.
"""
