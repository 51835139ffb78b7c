"""The eager-mode executor: swaps modules of models that cannot be traced.

May import `execution` except for other executors, and below.
"""
