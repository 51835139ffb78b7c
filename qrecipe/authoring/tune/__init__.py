"""Searching for the cheapest recipe within an accuracy budget. May import what `authoring` may."""
