"""Findings, exceptions and codes; text that is safe to print; suggestions for misspelled names.

May import nothing of qrecipe.
"""
