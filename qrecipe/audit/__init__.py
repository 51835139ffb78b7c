"""Shared checks and measures: SQNR, samples, ranges, averages, float kernels, code around roots.

May import `planning` and below.
"""
