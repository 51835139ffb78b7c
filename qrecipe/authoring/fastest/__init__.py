"""Choosing int8 or float for each site by time."""
