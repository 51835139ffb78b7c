"""Which sites cost accuracy: the ranking. May import what `measure` may."""
