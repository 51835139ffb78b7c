"""Proposing a recipe for a model."""
