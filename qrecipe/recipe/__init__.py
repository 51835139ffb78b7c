"""From TOML text to a `Recipe`: schema, layers, references, checks and lint.

May import `registry`, `files`, what is below them, and no torch.
"""
