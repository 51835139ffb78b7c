"""The command line: `app` has the commands, one module each.

Nothing in the library imports it, and it imports torch only when a command needs it. May import
everything but `testing`.
"""
