"""Running a quantized model: one recipe in every runtime that is installed.

May import `measure` and below.
"""
