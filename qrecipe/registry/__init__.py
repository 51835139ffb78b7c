"""The names that a recipe may use: torch's own, registered ones, and those of entry points.

May import `errors` and no torch.
"""
