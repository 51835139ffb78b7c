"""Rewrites of traced graphs that compute the same in a form that torch can fuse or quantize.

One file each. They run once calls have their addresses, and values have been recorded.
"""
