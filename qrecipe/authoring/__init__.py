"""Writing and checking recipes: proposals, searches, locks and differences.

May import `artifact` and below.
"""
