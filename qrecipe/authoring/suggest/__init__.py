"""Suggesting a recipe for a model."""
