"""The runtimes that may be installed here: files and models as sessions, and their kernels.

May import `model` and below.
"""
