"""State of the process and the thread that is changed temporarily.

May import `errors`.
"""
