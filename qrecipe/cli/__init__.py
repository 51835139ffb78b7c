"""The command line: `app` declares the commands, and one module each does the work.

The library imports nothing of it, and it imports torch only when a command needs it. May import
everything but `testing`.
"""
