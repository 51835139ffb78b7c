"""The command line: `app` has the commands, one module each.

The library imports nothing of it, and it imports torch only when a command needs it. May import
everything but `testing`.
"""
