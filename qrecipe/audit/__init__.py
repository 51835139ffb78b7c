"""The yardsticks: SQNR, samples, ranges, averages, float kernels, the code around roots.

May import `planning` and below.
"""
