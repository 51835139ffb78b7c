"""Pieces of work on the caller's workers: `concurrent.futures`, Dask and others of its interface.

May import `planning` and below.
"""
