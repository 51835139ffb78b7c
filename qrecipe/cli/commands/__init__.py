"""The commands as Typer declares them; the work of each is in the module of its name.

May import what `cli` may.
"""
