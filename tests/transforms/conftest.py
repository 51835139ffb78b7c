"""Installed distributions, for the tests of plugins."""

from __future__ import annotations

from distributions import site

__all__ = ["site"]
