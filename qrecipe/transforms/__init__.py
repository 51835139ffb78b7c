"""Steps before quantization that keep what the float model computes.

May import `execution` and below.
"""
