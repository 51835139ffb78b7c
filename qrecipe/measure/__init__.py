"""What quantization costs: sensitivity, comparison, drift, and their pages.

May import `execution` and below.
"""
