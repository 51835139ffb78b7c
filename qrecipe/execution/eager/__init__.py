"""The executor that swaps modules, for models that cannot be traced.

May import `execution` beside the other executors, and below.
"""
