"""The float model: a call of it, copies, dry runs, the trace and its proof, sites.

May import `observers`, `rules` and below.
"""
