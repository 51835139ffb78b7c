"""Lock files: the plan that was approved, to be compared with the current plan.

May import what `authoring` may.
"""
