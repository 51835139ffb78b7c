"""Measuring what quantization costs and gains."""
