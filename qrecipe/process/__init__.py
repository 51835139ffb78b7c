"""State of the process and of the thread that is changed for a moment and put back.

May import `recipe` and below.
"""
