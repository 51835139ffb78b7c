"""Lock files: what was decided, to be held against what would be."""
