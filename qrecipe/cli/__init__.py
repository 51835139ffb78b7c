"""The command line: `app` declares the commands, and one module each does the work.

The library imports nothing from here, and torch is only imported by commands that need it.
"""
