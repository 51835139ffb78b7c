"""Which rule decides which operation."""
