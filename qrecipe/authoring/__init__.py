"""Writing and checking recipes: proposals, searches, locks and differences.

May import `measure` and below.
"""
