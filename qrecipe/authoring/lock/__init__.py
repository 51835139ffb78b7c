"""Lock files: a committed plan, compared with what would be planned today."""
