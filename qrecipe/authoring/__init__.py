"""Writing, locking and comparing recipes and their plans."""
