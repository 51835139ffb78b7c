"""Steps before quantization that do not change what the float model computes.

May import `execution` and below.
"""
