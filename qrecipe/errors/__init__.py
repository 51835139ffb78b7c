"""Findings, exceptions and their codes; text that is safe to print; the nearest known name.

May import nothing of qrecipe.
"""
