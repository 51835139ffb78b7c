"""Lock files: what was decided, to be compared with what would be.

May import what `authoring` may.
"""
