<<<<<<< HEAD
"""Findings, exceptions and codes; text that is safe to print; suggestions for misspelled names."""
=======
"""Findings, exceptions and their codes; text that is safe to print; the nearest known name.

May import nothing of qrecipe.
"""
>>>>>>> main
