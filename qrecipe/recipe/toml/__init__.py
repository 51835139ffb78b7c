"""TOML documents: reading, positions, size limits, syntax errors and writing.

May import `errors` and `files`.
"""
