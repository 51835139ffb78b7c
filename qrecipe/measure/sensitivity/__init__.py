"""Which sites cost accuracy: the ranking."""
