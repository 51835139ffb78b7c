"""Ranking the sites by the accuracy that they cost."""
