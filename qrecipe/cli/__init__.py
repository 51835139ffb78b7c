"""The command line: `app` declares the commands, a module each does their work.

Nothing here is imported by the library, and nothing that needs torch before a command needs it.
"""
