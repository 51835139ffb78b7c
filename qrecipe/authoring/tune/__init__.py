"""Searching for the cheapest recipe within an accuracy budget."""
