"""What quantization costs: sensitivity, comparison, profile, drift, and their pages.

May import `artifact` and below.
"""
