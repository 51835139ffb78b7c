"""Proposing a recipe for a model. May import what `authoring` may."""
