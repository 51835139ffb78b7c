"""Which rule decides which operation. May import `recipe`, what is below it, and no torch."""
